// Threads that live between batches and share out the images of each.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace lape {

class ThreadPool {
 public:
  using Task = std::function<void(size_t index, int worker)>;

  // `threads` >= 1 work on a batch; the calling thread is one of them. std::system_error: there are no more.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls task(index, worker) once for each index < count, with worker < threads, and returns when all calls
  // have. The task must not throw. Images differ in cost, so a thread takes one index at a time.
  void run(size_t count, const Task& task);

 private:
  void join();
  void serve(int worker);
  void work(int worker);

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  const Task* task_ = nullptr;
  size_t count_ = 0;
  uint64_t batch_ = 0;  // how many batches have been started
  size_t busy_ = 0;     // threads that have not finished the present one
  bool stop_ = false;
  std::atomic<size_t> next_{0};
};

}  // namespace lape
