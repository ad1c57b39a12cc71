"""Hypothesis strategies for entries: any kind, any values that the registry allows."""

from hypothesis import strategies as st

from audit.transparency.entry import INT64_MAX, KINDS, SAFE_INT_MAX, Entry, Field, Value, is_decimal_field

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


def values(field: Field) -> st.SearchStrategy[Value]:
    if field.type == "str":
        return st.sampled_from(field.choices) if field.choices else texts
    if field.type == "int":
        return st.integers(field.minimum, INT64_MAX if is_decimal_field(field.name) else SAFE_INT_MAX)
    if field.type == "bool":
        return st.booleans()
    return st.lists(texts, max_size=4)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    kind = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    body = {field.name: draw(values(field)) for field in kind.fields}
    return Entry(kind.name, draw(st.sampled_from(["", "ten_a", "ten_b"])), draw(st.integers(0, INT64_MAX)), body)
