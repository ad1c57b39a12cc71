// The C ABI: which instruction set, how many threads, and each op cut into pieces for the pool.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <cstdlib>
#include <cstring>
#include <new>

#include "blocks.h"
#include "ops.h"
#include "pool.h"
#include "top.h"

// The sets that the compiler knew: setup.py defines BULKHEAD_<SET> for each.
extern const Ops ops_portable, ops_avx2, ops_avx512, ops_avx512_bf16, ops_amx;

namespace {

struct Isa {
    const char* name;
    const Ops* ops;
    bool (*supported)();
};

#if defined(__x86_64__)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {  // and an operating system that keeps its registers
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}

bool has_avx512_bf16() {
    unsigned eax, ebx, ecx, edx;
    return has_avx512() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}

// Flags of the processor, and an operating system that keeps the tiles and gives this process leave to use them
// (Linux: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA); asking again does no harm).
bool has_amx() {
    unsigned eax, ebx, ecx, edx;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx >> 22 & 1) || !(edx >> 24 & 1))
        return false;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low >> 17 & 3) != 3)
        return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}
#endif

const Isa ISAS[] = {  // best first
#if defined(BULKHEAD_AMX)
    {"amx", &ops_amx, has_amx},
#endif
#if defined(BULKHEAD_AVX512_BF16)
    {"avx512_bf16", &ops_avx512_bf16, has_avx512_bf16},
#endif
#if defined(BULKHEAD_AVX512)
    {"avx512", &ops_avx512, has_avx512},
#endif
#if defined(BULKHEAD_AVX2)
    {"avx2", &ops_avx2, has_avx2},
#endif
    {"portable", &ops_portable, [] { return true; }},
};
constexpr int NUM_ISAS = sizeof ISAS / sizeof ISAS[0];

Pool& pool() {
    static Pool* forever = new Pool;  // its threads live as long as the process
    return *forever;
}

struct Scratch {
    float* memory = nullptr;
    size_t num_floats = 0;

    float* at_least(size_t num) {
        if (num > num_floats) {
            std::free(memory);
            num_floats = 0;
            memory = static_cast<float*>(std::aligned_alloc(64, (num * sizeof(float) + 63) / 64 * 64));
            if (!memory)
                std::abort();
            num_floats = num;
        }
        return memory;
    }

    ~Scratch() { std::free(memory); }
};

thread_local Scratch scratch;
thread_local Scratch inputs, normed;  // of the calling thread, read by all

template <class Args> struct Job {
    const Args* args;
    void (*work)(const Args*, int64_t, int64_t);
    int64_t num, chunk;
};

template <class Args> void in_chunks(const Args* args, void (*work)(const Args*, int64_t, int64_t), int64_t num, int64_t chunk) {
    const Job<Args> job{args, work, num, chunk};
    pool().run(
        [](const void* context, int64_t piece) {
            const auto* j = static_cast<const Job<Args>*>(context);
            const int64_t begin = piece * j->chunk, end = begin + j->chunk;
            j->work(j->args, begin, end < j->num ? end : j->num);
        },
        &job, (num + chunk - 1) / chunk);
}

struct AttentionJob {
    const AttentionArgs* args;
    const Ops* ops;
    size_t scratch_floats;
    int64_t num, chunk;
};

constexpr int64_t TOKENS_PER_PIECE = 8;
// Elements of two microseconds of work or more. The other threads are awake: they have just ended a product.
constexpr int64_t ELEMENTS_PER_PIECE = 1 << 13;

int64_t tokens_per_piece(int64_t size) {
    return size < ELEMENTS_PER_PIECE ? ELEMENTS_PER_PIECE / (size < 1 ? 1 : size) : 1;
}
constexpr int64_t PIECES_PER_THREAD = 8;     // so that threads end together
constexpr int64_t ITEMS_PER_THREAD_MIN = 4;  // with fewer, an item's heads are shared out
constexpr int64_t PANELS_PER_PIECE_MIN = 2;  // some microseconds of work

} // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int bulkhead_abi() {
    return 9;
}

// Name of the i-th instruction set that was built, best first; null beyond the last.
EXPORT const char* bulkhead_isa_name(int index) {
    return index >= 0 && index < NUM_ISAS ? ISAS[index].name : nullptr;
}

EXPORT int bulkhead_isa_supported(int index) {
    return index >= 0 && index < NUM_ISAS && ISAS[index].supported();
}

EXPORT void bulkhead_set_num_threads(int num) {
    pool().set_num_threads(num);
}

EXPORT void bulkhead_rms_norm(int isa, const NormArgs* args) {
    in_chunks(args, ISAS[isa].ops->rms_norm, args->num_tokens, tokens_per_piece(args->size));
}

EXPORT void bulkhead_activate_and_mul(int isa, const ActivationArgs* args) {
    in_chunks(args, ISAS[isa].ops->activate_and_mul, args->num_tokens, tokens_per_piece(args->size));
}

EXPORT void bulkhead_digest_blocks(const BlocksArgs* args) {
    in_chunks(args, digest_blocks, args->num_ids, 1);
}

EXPORT void bulkhead_fill_blocks(const BlocksArgs* args) {
    in_chunks(args, fill_blocks, args->num_ids, 1);
}

EXPORT void bulkhead_attention(int isa, const AttentionArgs* args) {
    const Ops* ops = ISAS[isa].ops;
    const int64_t num_heads = args->num_kv_heads;
    const int64_t chunk = args->num_items >= ITEMS_PER_THREAD_MIN * pool().num_threads() ? num_heads : 1;
    AttentionArgs all = *args;
    all.items_apart = pool().num_threads();
    const AttentionJob job{&all, ops, static_cast<size_t>(ops->attention_scratch(args)), args->num_items * num_heads, chunk};
    pool().run(
        [](const void* context, int64_t piece) {
            const auto* j = static_cast<const AttentionJob*>(context);
            const int64_t begin = piece * j->chunk, end = begin + j->chunk;
            j->ops->attention(j->args, begin, end < j->num ? end : j->num, scratch.at_least(j->scratch_floats));
        },
        &job, (job.num + chunk - 1) / chunk);
}

// Rope with the write into the cache, then attention; of which either may be null, to measure the other. They hold the rest.
EXPORT void bulkhead_attend(int isa, const RopeArgs* rope, const AttentionArgs* attention, void* qkv, const float* cos,
                            const float* sin, void* key_cache, void* value_cache, void* out) {
    if (rope) {
        RopeArgs all = *rope;
        all.qkv = qkv;
        all.cos = cos;
        all.sin = sin;
        all.key_cache = key_cache;
        all.value_cache = value_cache;
        const int64_t size = static_cast<int64_t>(all.num_heads + 2 * all.num_kv_heads) * all.head_size;
        in_chunks(&all, ISAS[isa].ops->rope_and_store, all.num_tokens, tokens_per_piece(size));
    }
    if (attention) {
        AttentionArgs all = *attention;
        all.query = qkv;
        all.key_cache = key_cache;
        all.value_cache = value_cache;
        all.out = out;
        bulkhead_attention(isa, &all);
    }
}

EXPORT void bulkhead_top(int isa, const TopArgs* args) {
    struct Rows {
        const TopArgs* args;
        const Ops* ops;
        size_t num_floats;
    };
    const Ops* ops = ISAS[isa].ops;
    const Rows rows{args, ops, static_cast<size_t>(top_bytes(ops, args)) / sizeof(float) + 1};
    pool().run(
        [](const void* context, int64_t row) {
            const auto* r = static_cast<const Rows*>(context);
            top(r->ops, r->args, row, scratch.at_least(r->num_floats));
        },
        &rows, args->num_rows);
}

EXPORT int bulkhead_panel(int isa) {
    return ISAS[isa].ops->panel;
}

EXPORT int bulkhead_bf16_inputs(int isa) {
    return ISAS[isa].ops->bf16_inputs;
}

// x [num_rows, in] -> y [num_rows, out]; `matrix` holds the rest and is not written.
EXPORT void bulkhead_product(int isa, const ProductArgs* matrix, const void* x, void* y, int64_t num_rows) {
    const Ops* ops = ISAS[isa].ops;
    ProductArgs all = *matrix;
    all.x = all.x_ready = x;
    all.y = y;
    all.num_rows = num_rows;
    const int64_t num_bytes = ops->ready_bytes(&all);
    if (num_bytes) {
        all.x_ready = inputs.at_least(static_cast<size_t>(num_bytes) / sizeof(float));
        in_chunks(&all, ops->make_ready, all.num_rows, TOKENS_PER_PIECE);
    }
    const int64_t columns = all.gated ? ops->panel / 2 : ops->panel;  // of y, in a panel
    const int64_t num_panels = (all.num_outputs + columns - 1) / columns;
    int64_t chunk = num_panels / (PIECES_PER_THREAD * pool().num_threads());
    chunk = chunk < PANELS_PER_PIECE_MIN ? PANELS_PER_PIECE_MIN : chunk / PANELS_PER_PIECE_MIN * PANELS_PER_PIECE_MIN;
    in_chunks(&all, ops->product, num_panels, chunk);
}

// rms_norm and a product of what comes, one after the other by the same threads, while they are awake: what the norm
// gives is seen by nobody else and lies in memory that is used again. `norm` and `matrix` hold the rest.
EXPORT void bulkhead_normed_product(int isa, const NormArgs* norm, const ProductArgs* matrix, const void* x, const float* residual,
                                    float* total, void* y, int64_t num_rows) {
    NormArgs all = *norm;
    all.x = x;
    all.residual = residual;
    all.total = total;
    all.num_tokens = num_rows;
    const int64_t num = num_rows * all.size, num_floats = all.dtype == BFLOAT16 ? (num + 1) / 2 : num;
    all.out = normed.at_least(static_cast<size_t>(num_floats));
    bulkhead_rms_norm(isa, &all);
    bulkhead_product(isa, matrix, all.out, y, num_rows);
}
