// One build's kernels on fixed numbers, without Python: for processors that only an emulator has (make native-aarch64).
// Attention against float64 and a chunk against its tokens one by one, bit for bit; then a digest, to be compared.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../kernels/cpu/src/ops.h"

extern "C" {
const char* bulkhead_isa_name(int);
void bulkhead_set_num_threads(int);
void bulkhead_attention(int, const AttentionArgs*);
void bulkhead_digest_blocks(const BlocksArgs*);
}

namespace {

constexpr int HEADS = 9, KV_HEADS = 3, SIZE = 64, BLOCK_SIZE = 16, NUM_BLOCKS = 10, NUM_NEW = 70, LENGTH = 150;

uint32_t state = 1;

uint16_t random_bf16() {
    state = state * 1664525u + 1013904223u;
    const float x = 3.0f * ((float)(state >> 8 & 0xffff) / 32768.0f - 1.0f);
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(bits >> 16);
}

double value_of(uint16_t bf16) {
    const uint32_t bits = (uint32_t)bf16 << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

} // namespace

int main() {
    bulkhead_set_num_threads(2);
    std::vector<uint16_t> query(NUM_NEW * HEADS * SIZE), key(NUM_BLOCKS * BLOCK_SIZE * KV_HEADS * SIZE), value(key.size());
    std::vector<uint16_t> out(query.size());
    for (auto* numbers : {&query, &key, &value})
        for (auto& number : *numbers)
            number = random_bf16();
    std::vector<int32_t> cu_seqlens{0, NUM_NEW}, kv_lens{LENGTH}, table, items, flags(NUM_NEW);
    std::vector<int64_t> refused(NUM_NEW), row_tags{7}, block_tags(NUM_BLOCKS, 7);
    for (int i = 0; i < NUM_BLOCKS; i++)
        table.push_back(i * 7 % NUM_BLOCKS);
    for (int t = 0; t < NUM_NEW; t += 16)
        items.insert(items.end(), {0, t, t + 16 < NUM_NEW ? t + 16 : NUM_NEW});
    AttentionArgs chunk{};
    chunk.query = query.data(), chunk.key_cache = key.data(), chunk.value_cache = value.data(), chunk.out = out.data();
    chunk.cu_seqlens = cu_seqlens.data(), chunk.kv_lens = kv_lens.data(), chunk.block_tables = table.data();
    chunk.items = items.data(), chunk.num_items = (int64_t)items.size() / 3, chunk.item_tokens_max = 16;
    chunk.row_tags = row_tags.data(), chunk.block_tags = block_tags.data();
    chunk.flags = flags.data(), chunk.refused = refused.data();
    chunk.query_stride = HEADS * SIZE, chunk.num_blocks = NUM_BLOCKS, chunk.table_width = NUM_BLOCKS;
    chunk.num_heads = HEADS, chunk.num_kv_heads = KV_HEADS, chunk.head_size = SIZE, chunk.block_size = BLOCK_SIZE;
    chunk.dtype = BFLOAT16, chunk.scale = 0.125f;
    bulkhead_attention(0, &chunk);

    double worst = 0;
    for (int t = 0; t < NUM_NEW; t++)
        for (int h = 0; h < HEADS; h++) {
            const int seen = LENGTH - NUM_NEW + t + 1;
            const uint16_t* q = &query[(size_t)(t * HEADS + h) * SIZE];
            std::vector<double> scores(seen), sums(SIZE);
            const auto place = [&](int j) {
                const int slot = table[j / BLOCK_SIZE] * BLOCK_SIZE + j % BLOCK_SIZE;
                return (size_t)(slot * KV_HEADS + h / (HEADS / KV_HEADS)) * SIZE;
            };
            double total = 0;
            for (int j = 0; j < seen; j++) {
                for (int d = 0; d < SIZE; d++)
                    scores[j] += value_of(q[d]) * value_of(key[place(j) + d]) * 0.125;
                const double weight = std::exp(scores[j]);
                total += weight;
                for (int d = 0; d < SIZE; d++)
                    sums[d] += weight * value_of(value[place(j) + d]);
            }
            for (int d = 0; d < SIZE; d++) {
                const double want = sums[d] / total, got = value_of(out[(size_t)(t * HEADS + h) * SIZE + d]);
                worst = std::fmax(worst, std::fabs(want - got) / (std::fabs(want) + 0.01));
            }
        }

    int num_different = 0;
    for (int t = 0; t < NUM_NEW; t++) {
        std::vector<int32_t> one{0, 1}, length{LENGTH - NUM_NEW + t + 1}, item{0, 0, 1};
        std::vector<uint16_t> alone(HEADS * SIZE);
        AttentionArgs decode = chunk;
        decode.query = &query[(size_t)t * HEADS * SIZE], decode.out = alone.data(), decode.cu_seqlens = one.data();
        decode.kv_lens = length.data(), decode.items = item.data(), decode.num_items = 1;
        bulkhead_attention(0, &decode);
        num_different += std::memcmp(alone.data(), &out[(size_t)t * HEADS * SIZE], 2 * alone.size()) != 0;
    }

    const int64_t block = 3;
    uint64_t digest[2];
    BlocksArgs blocks{};
    blocks.keys = key.data(), blocks.values = value.data(), blocks.block_ids = &block, blocks.digests = digest;
    blocks.num_blocks = NUM_BLOCKS, blocks.num_ids = 1, blocks.block_bytes = BLOCK_SIZE * KV_HEADS * SIZE * 2;
    blocks.key[0] = 1, blocks.key[1] = 2;
    bulkhead_digest_blocks(&blocks);
    const bool right = worst < 1.0 / 250 && num_different == 0 && flags[0] == 0 && digest[0] == 0x711735adc980751bu &&
                       digest[1] == 0x4353a2e81fe8f28bu;
    std::printf("%s: largest relative error %.1e, %d of %d tokens differ alone, digest %016llx %016llx: %s\n",
                bulkhead_isa_name(0), worst, num_different, NUM_NEW, (unsigned long long)digest[0],
                (unsigned long long)digest[1], right ? "right" : "WRONG");
    return right ? 0 : 1;
}
