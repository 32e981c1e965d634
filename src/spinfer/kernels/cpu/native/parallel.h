// Work shared between the threads of torch's pool.
#pragma once
#include <stdint.h>

#include <atomic>

#include "spinfer_cpu.h"

namespace spinfer {

extern std::atomic<spinfer_pool_t> g_pool;

// Call body(context, thread) on up to `threads` threads, each with its own number below `threads`.
template <class Context>
void on_threads(int threads, Context& context, void (*body)(Context&, int thread)) {
  const spinfer_pool_t pool = g_pool.load(std::memory_order_relaxed);
  if (threads <= 1 || !pool) return body(context, 0);
  struct Job {
    Context& context;
    void (*body)(Context&, int);
    std::atomic<int> next{0};
  } job{context, body};
  pool(
      [](void* data) {
        Job& self = *static_cast<Job*>(data);
        self.body(self.context, self.next.fetch_add(1, std::memory_order_relaxed));
      },
      &job, unsigned(threads), 0);
}

// Call each(begin, end) over [0, n) in pieces of `step`, taken dynamically.
template <class Each>
void parallel_for(int threads, int64_t n, int64_t step, Each each) {
  struct Loop {
    Each& each;
    int64_t n, step;
    std::atomic<int64_t> next{0};
  } loop{each, n, step};
  if (n <= 0) return;
  const int64_t pieces = (n + step - 1) / step;
  on_threads<Loop>(int(pieces < threads ? pieces : threads), loop, [](Loop& self, int) {
    for (;;) {
      const int64_t begin = self.next.fetch_add(self.step, std::memory_order_relaxed);
      if (begin >= self.n) return;
      self.each(begin, begin + self.step < self.n ? begin + self.step : self.n);
    }
  });
}

}  // namespace spinfer
