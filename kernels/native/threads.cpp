// A pool of helpers that costs nothing when a neighbour takes a core away.
//
// A decoding step has hundreds of pieces of work of 10 to 100 us. Helpers therefore watch for work a short while before
// they sleep, and give the core away as they watch. The caller works too and never waits for a helper that has not begun:
// every piece is claimed by one atomic step, and only claimed pieces are waited for.
//
// It does wait for a piece whose helper has lost its core. So a thread that is about to compute beside the kernels borrows one:
// a helper then sleeps, and the caller works on without it instead of waiting for it.
//
// Each thread has a queue of neighbouring pieces, and takes from the others' when its own is empty. So from one piece of
// work to the next a thread meets the tokens, and reads on behind the weights, that are in its cache.

#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
static inline void pause_briefly() { _mm_pause(); }
#else
static inline void pause_briefly() {}
#endif

namespace {

constexpr int PAUSES = 200;
constexpr auto WATCH = std::chrono::microseconds(500);
constexpr uint64_t ROUND = uint64_t(1) << 32;  // a ticket is the number of the job, times this, plus the next piece
constexpr uint64_t PIECE_MASK = ROUND - 1;
constexpr int LENDER = 0;  // the helper whose core is lent
constexpr int MOST_QUEUES = 256;  // threads beyond them share

// The pieces up to `end` that a thread takes first.
struct alignas(64) Queue {
    std::atomic<uint64_t> ticket{PIECE_MASK};
    std::atomic<Index> end{0};
};

// The job at hand. Written only while its tickets show no pieces, so whoever claims a piece has read it whole: who reads the
// next job's `end` finds tickets that were taken away before (the fence in `open`), and claims nothing by the last one's.
struct Job {
    std::atomic<Piece> run{nullptr};
    std::atomic<const void*> work{nullptr};
    std::atomic<int> num_queues{0};
    std::atomic<uint64_t> round{0};
    alignas(64) std::atomic<Index> num_done{0};  // in a line that no helper watches
    Queue queues[MOST_QUEUES];
};

class Pool {
public:
    // Never destroyed: helpers may sleep in it until the process ends.
    static Pool& instance() {
        static Pool* pool = new Pool;
        return *pool;
    }

    int size() const { return size_.load(std::memory_order_relaxed); }

    // Returns the size that it has from here on: less than asked for if the system gives no more threads.
    int resize(int size) {
        const std::lock_guard<std::mutex> guard(callers_);
        try {
            for (; num_helpers_ < size - 1; ++num_helpers_)
                std::thread([this, number = num_helpers_] { help(number); }).detach();
        } catch (const std::system_error&) {
        }
        size_ = std::clamp(size, 1, num_helpers_ + 1);
        return size_;
    }

    // The lender sleeps until as many returns as loans have come, or the last loan's time is over.
    void lend(std::chrono::microseconds at_most) {
        const std::lock_guard<std::mutex> guard(loans_);
        const int64_t others_end = num_loans_++ > 0 ? loans_end_.load() : 0;
        loans_end_ = std::max(others_end, now_us() + at_most.count());
        is_lent_.store(1);
    }

    void take_back() {
        const std::lock_guard<std::mutex> guard(loans_);
        if (--num_loans_ == 0) wake_lender();
    }

    void run(Piece run, const void* work, Index count) {
        if (is_lent_.load(std::memory_order_relaxed) && now_us() > loans_end_.load(std::memory_order_relaxed)) end_loans();
        const std::unique_lock<std::mutex> guard(callers_, std::try_to_lock);
        if (!guard.owns_lock() || size() == 1 || count == 1) {
            for (Index piece = 0; piece < count; ++piece) run(work, piece);
            return;
        }
        const int num_queues = open(run, work, count);
        if (num_sleeping_.load() > 0) job_.round.notify_all();
        take_pieces(round_, 0);
        for (int turn = 0; job_.num_done.load(std::memory_order_acquire) < count; ++turn)
            turn % PAUSES == PAUSES - 1 ? std::this_thread::yield() : pause_briefly();
        for (int q = 0; q < num_queues; ++q)
            job_.queues[q].ticket.store(round_ | PIECE_MASK, std::memory_order_relaxed);
    }

private:
    static int64_t now_us() {
        const auto now = std::chrono::steady_clock::now().time_since_epoch();
        return std::chrono::duration_cast<std::chrono::microseconds>(now).count();
    }

    // A loan that begins meanwhile goes on.
    void end_loans() {
        const std::unique_lock<std::mutex> guard(loans_, std::try_to_lock);
        if (guard.owns_lock() && now_us() > loans_end_.load()) wake_lender();
    }

    void wake_lender() {
        if (is_lent_.exchange(0)) is_lent_.notify_all();
    }

    // Shares the pieces out; returns to how many queues.
    int open(Piece run, const void* work, Index count) {
        const int num_queues = static_cast<int>(std::min<Index>({size(), MOST_QUEUES, count}));
        std::atomic_thread_fence(std::memory_order_release);  // the last job's tickets go before this one's stores
        job_.run.store(run, std::memory_order_relaxed);
        job_.work.store(work, std::memory_order_relaxed);
        job_.num_queues.store(num_queues, std::memory_order_relaxed);
        job_.num_done.store(0, std::memory_order_relaxed);
        round_ += ROUND;
        for (int q = 0; q < num_queues; ++q) {
            job_.queues[q].end.store(count * (q + 1) / num_queues, std::memory_order_relaxed);
            job_.queues[q].ticket.store(round_ | (count * q / num_queues), std::memory_order_release);
        }
        job_.round.store(round_);  // in one order with num_sleeping_, which helpers set before they look again
        return num_queues;
    }

    // Claims and runs pieces of the job numbered `round` until none is left, those of the thread's own queue first. It says
    // once how many they were: threads that count at every piece take the line from each other as often.
    void take_pieces(uint64_t round, int number) {
        const int num_queues = job_.num_queues.load(std::memory_order_relaxed);
        Index num_done = 0;
        for (int q = 0; q < num_queues; ++q) num_done += take_from(job_.queues[(number + q) % num_queues], round);
        if (num_done > 0) job_.num_done.fetch_add(num_done, std::memory_order_release);
    }

    // Returns how many.
    Index take_from(Queue& queue, uint64_t round) {
        Index num_done = 0;
        uint64_t ticket = queue.ticket.load(std::memory_order_acquire);
        while ((ticket & ~PIECE_MASK) == round) {
            const Index piece = ticket & PIECE_MASK;
            const Piece run = job_.run.load(std::memory_order_relaxed);
            const void* work = job_.work.load(std::memory_order_relaxed);
            if (piece >= queue.end.load(std::memory_order_acquire)) break;
            if (!queue.ticket.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
            run(work, piece);
            ++num_done;
            ticket = queue.ticket.load(std::memory_order_acquire);
        }
        return num_done;
    }

    void help(int number) {
        uint64_t seen = job_.round.load(std::memory_order_acquire);
        for (;;) {
            seen = await_job(seen, number);
            if (number < size() - 1) take_pieces(seen, number + 1);
        }
    }

    // Returns the number of a job other than `seen`: watches for one, then sleeps.
    uint64_t await_job(uint64_t seen, int number) {
        const auto end = std::chrono::steady_clock::now() + WATCH;
        for (int turn = 0;; ++turn) {
            if (number == LENDER && is_lent_.load(std::memory_order_relaxed)) is_lent_.wait(1);
            const uint64_t round = job_.round.load(std::memory_order_acquire);
            if (round != seen) return round;
            if (turn % PAUSES != PAUSES - 1) {
                pause_briefly();
                continue;
            }
            std::this_thread::yield();
            if (std::chrono::steady_clock::now() < end) continue;
            ++num_sleeping_;
            if (job_.round.load() == seen) job_.round.wait(seen);
            --num_sleeping_;
        }
    }

    Job job_;
    uint64_t round_ = 0;
    std::mutex callers_;
    std::atomic<int> size_{1};
    std::atomic<int> num_sleeping_{0};
    int num_helpers_ = 0;
    std::mutex loans_;
    int num_loans_ = 0;
    std::atomic<int64_t> loans_end_{0};  // microseconds of the steady clock
    std::atomic<int> is_lent_{0};
};

}  // namespace

int num_threads() { return Pool::instance().size(); }

void run_pieces(Piece run, const void* work, Index count) { Pool::instance().run(run, work, count); }

extern "C" {
int set_num_threads(int count) { return Pool::instance().resize(count); }
void lend_core(int64_t at_most_us) { Pool::instance().lend(std::chrono::microseconds(at_most_us)); }
void take_core_back() { Pool::instance().take_back(); }
}
