// A few threads that claim pieces of a job by counting. Which thread computes a piece never matters to its bits.
//
// `next_` holds (job number << 32 | next piece). A claim is a compare-and-swap on both halves, so a thread that comes
// late from an old job cannot take a piece of a new one; between jobs it is closed, so that it cannot mix two either.
// Waiting spins for a bounded time, then sleeps: a busy
// neighbour on the core costs a wake-up, never a spinning barrier.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

class Pool {
  public:
    using Work = void (*)(const void* context, int64_t piece);

    // Threads in all, the caller's included. Threads are only ever added; surplus ones sleep.
    void set_num_threads(int num) {
        std::lock_guard<std::mutex> caller(calls_);
        num_threads_ = num < 1 ? 1 : num > MAX_THREADS ? MAX_THREADS : num;
        for (; num_started_ < num_threads_ - 1; num_started_++)
            std::thread([this, index = num_started_] { serve(index); }).detach();
    }

    int num_threads() const { return num_threads_; }

    void run(Work work, const void* context, int64_t num_pieces) {
        std::unique_lock<std::mutex> caller(calls_, std::try_to_lock);
        if (!caller.owns_lock() || num_threads_ == 1 || num_pieces <= 1 || num_pieces > INT32_MAX) {
            for (int64_t piece = 0; piece < num_pieces; piece++)
                work(context, piece);
            return;
        }
        const uint64_t job = next_.load() >> 32;
        next_.store(job << 32 | CLOSED);
        work_.store(work);
        context_.store(context);
        num_pieces_.store(num_pieces);
        num_helpers_.store(num_threads_ - 1);
        num_done_.store(0);
        next_.store(((job + 1) & CLOSED) << 32);
        if (num_asleep_.load() > 0) {
            std::lock_guard<std::mutex> lock(sleep_);
            wake_.notify_all();
        }
        while (claim_one())
            ;
        for (int i = 0; num_done_.load(std::memory_order_acquire) < num_pieces; i++)
            i < SPINS ? pause() : std::this_thread::yield();
    }

  private:
    static constexpr uint64_t CLOSED = 0xffffffffu;  // as a piece: beyond every job's last
    static constexpr int MAX_THREADS = 256;
    static constexpr int SPINS = 4000;  // some tens of microseconds

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    bool claim_one() {
        uint64_t seen = next_.load();
        const Work work = work_.load();
        const void* context = context_.load();
        const int64_t num_pieces = num_pieces_.load();
        const int64_t piece = (int64_t)(seen & CLOSED);
        if (piece >= num_pieces)
            return false;
        if (!next_.compare_exchange_strong(seen, seen + 1))
            return true;  // somebody was faster: look again
        work(context, piece);
        num_done_.fetch_add(1, std::memory_order_release);
        return true;
    }

    void serve(int index) {
        uint64_t job = 0;
        for (;;) {
            for (int i = 0; i < SPINS && next_.load(std::memory_order_relaxed) >> 32 == job; i++)
                pause();
            if (next_.load() >> 32 == job) {
                std::unique_lock<std::mutex> lock(sleep_);
                num_asleep_.fetch_add(1);
                wake_.wait(lock, [&] { return next_.load() >> 32 != job; });
                num_asleep_.fetch_sub(1);
            }
            job = next_.load() >> 32;
            if (index < num_helpers_.load())
                while (claim_one())
                    ;
        }
    }

    std::mutex calls_;  // one job at a time; whoever comes second works alone
    int num_threads_ = 1, num_started_ = 0;
    std::atomic<Work> work_{nullptr};
    std::atomic<const void*> context_{nullptr};
    std::atomic<int64_t> num_pieces_{0}, num_done_{0};
    std::atomic<int> num_helpers_{0}, num_asleep_{0};
    std::atomic<uint64_t> next_{0};
    std::mutex sleep_;
    std::condition_variable wake_;
};
