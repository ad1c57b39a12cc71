"""Text that nobody has sent before: prompts of short words, and markers to look for."""

import base64
from collections.abc import Callable
from dataclasses import dataclass

WORDS = """
apple arrow basket beach bell bird bottle branch bread bridge brush candle carpet castle chair cloud coat coin
copper corner cotton cup desert door drum eagle field finger fire fish flag flower forest fruit garden gate
glass glove gold grape grass hammer harbor hat honey horse island jacket kettle key kitchen ladder lake lamp
leaf lemon letter lion mango maple market meadow melon mirror moon morning mountain mouse needle nest night
ocean olive onion orange oven paper parrot pencil pepper pillow planet plate pocket potato purple rabbit rain
ribbon river road roof rope rose salad salt sand school seed shell ship shoe silver sky smoke snow soap soup
spoon spring square star stone street sugar summer sun table tent thread tiger tomato tower train tree valley
violin wagon wall water wheat wheel window winter wolf wood yellow zebra
""".split()  # noqa: SIM905 (a page of words, not a list of strings)

Entropy = Callable[[int], bytes]


def fresh_text(num_words: int, entropy: Entropy) -> str:
    """``num_words`` words, drawn: the first few already differ from every other such text."""
    return " ".join(WORDS[int.from_bytes(entropy(2)) % len(WORDS)] for _ in range(num_words))


@dataclass(frozen=True, slots=True)
class Marker:
    """128 bits, as words that a model can repeat, and in two encodings that no chance produces."""

    words: str
    hexadecimal: str
    base32: str

    @classmethod
    def drawn(cls, entropy: Entropy) -> "Marker":
        secret = entropy(16)
        return cls(fresh_text(6, entropy), secret.hex(), base64.b32encode(secret).decode().rstrip("="))

    @property
    def text(self) -> str:
        return f"The password is {self.words}. Its number is {self.hexadecimal}, or {self.base32}."

    def found_in(self, heard: bytes) -> str:
        """Which part of the marker is there: four of its words in a row, or twelve letters of an encoding; or ""."""
        text = " ".join(heard.decode(errors="replace").lower().split())
        words = self.words.split()
        for first in range(len(words) - 3):
            if (part := " ".join(words[first : first + 4])) in text:
                return part
        for encoded in (self.hexadecimal, self.base32.lower()):
            for first in range(len(encoded) - 11):
                if (part := encoded[first : first + 12]) in text:
                    return part
        return ""
