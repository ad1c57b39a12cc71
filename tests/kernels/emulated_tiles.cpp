// kernels/cpu/src/product_amx.h on emulated tiles, as a library of one function: see test_tiles.py.
#include <cstdlib>

#include "emulated_tiles.h"
#include "product_amx.h"

static_assert(sizeof(amx::Config) == 64, "as the instruction reads it");

// Panels begin..end; the rows of x in two parts, as two threads would make them ready. Returns the number of faults.
extern "C" int emulated_product(const ProductArgs* args, int64_t begin, int64_t end, int64_t weight_bytes) {
    ProductArgs a = *args;
    const int64_t ready = amx::ready_bytes(&a), x_bytes = ready ? ready : a.num_rows * a.num_inputs * 2;
    a.x_ready = ready ? std::malloc((size_t)ready) : a.x;
    if (ready) {
        std::memset(const_cast<void*>(a.x_ready), 0xff, (size_t)ready);  // no number: nothing may be left as it was
        amx::make_ready(&a, 0, a.num_rows / 2);
        amx::make_ready(&a, a.num_rows / 2, a.num_rows);
    }
    emulated::num_faults = 0;
    emulated::num_configured = emulated::num_released = 0;
    emulated::allowed[0] = {(const char*)a.x_ready, (const char*)a.x_ready + x_bytes};
    emulated::allowed[1] = {(const char*)a.weight, (const char*)a.weight + weight_bytes};
    if (a.y_dtype == FLOAT32)
        amx::product<float>(&a, begin, end);
    else
        amx::product<bf16>(&a, begin, end);
    emulated::expect(emulated::num_released == 1);
    if (ready)
        std::free(const_cast<void*>(a.x_ready));
    return emulated::num_faults;
}
