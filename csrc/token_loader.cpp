#include "token_loader.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <sstream>

namespace token_loader {
namespace {

constexpr int ROUNDS = 8;
constexpr int64_t MAX_TOKENS = int64_t{1} << 60;  // of a shard; keeps sums and bytes within int64
constexpr int64_t MAX_BLOCK = int64_t{1} << 30;
constexpr int COLD_BATCHES = 64;  // batches that are read ahead after one had to wait for the disk
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;

// The finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
// 2014).
uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

uint64_t epoch_key(uint64_t seed, int64_t epoch) {
  return mix(mix(seed + GOLDEN) + GOLDEN * (static_cast<uint64_t>(epoch) + 1));
}

// A keyed bijection on [0, n): an alternating Feistel network on the next power of two (at least
// 4), applied again while the result lies outside [0, n) (cycle walking; fewer than two passes on
// average).
int64_t permute(int64_t index, int64_t n, uint64_t key) {
  int bits = 2;
  while ((int64_t{1} << bits) < n) ++bits;
  const int low_bits = bits / 2;
  const uint64_t low_mask = (uint64_t{1} << low_bits) - 1;
  const uint64_t high_mask = (uint64_t{1} << (bits - low_bits)) - 1;
  uint64_t value = static_cast<uint64_t>(index);
  do {
    uint64_t low = value & low_mask, high = value >> low_bits;
    for (int round = 0; round < ROUNDS; round += 2) {
      low ^= mix(high + key + GOLDEN * (round + 1)) & low_mask;
      high ^= mix(low + key + GOLDEN * (round + 2)) & high_mask;
    }
    value = (high << low_bits) | low;
  } while (value >= static_cast<uint64_t>(n));
  return static_cast<int64_t>(value);
}

template <typename... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Page faults of this thread that had to wait for the disk.
int64_t major_faults() {
#ifdef RUSAGE_THREAD
  struct rusage usage{};
  return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_majflt : 0;
#else
  return 0;
#endif
}

// Where SIGBUS takes this thread while it reads mapped memory; null while it does not.
thread_local sigjmp_buf* volatile landing = nullptr;
struct sigaction previous_action {};

void on_sigbus(int signal, siginfo_t*, void*) {
  if (landing != nullptr) siglongjmp(*landing, 1);
  sigaction(SIGBUS, &previous_action, nullptr);  // not ours: to whom it would have gone
  raise(signal);
}

bool install_handler() {
  struct sigaction action {};
  action.sa_sigaction = on_sigbus;
  // NODEFER: the jump leaves the handler without restoring a signal mask, which is a system call.
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  return sigaction(SIGBUS, &action, &previous_action) == 0;
}

// Copies tokens source[0, x_count) to x and [skip, count) to y[-1 + i]; returns the largest of all.
[[gnu::noinline]] uint16_t widen(const uint16_t* source, int64_t count, int64_t* x, int64_t x_count,
                                 int64_t* y, int64_t skip) {
  for (int64_t i = 0; i < x_count; ++i) x[i] = source[i];
  for (int64_t i = skip; i < count; ++i) y[i - 1] = source[i];
  uint16_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, source[i]);
  return largest;
}

// As widen, but -1 where the file has no such bytes any more or they cannot be read. Nothing here
// has a destructor, which a jump would leave out.
int32_t widen_guarded(const uint16_t* source, int64_t count, int64_t* x, int64_t x_count,
                      int64_t* y, int64_t skip) {
  sigjmp_buf here;
  int32_t largest = -1;
  if (sigsetjmp(here, 0) == 0) {
    landing = &here;
    largest = widen(source, count, x, x_count, y, skip);
  }
  landing = nullptr;
  return largest;
}

// Has the processor fetch tokens from memory meanwhile; never waits for the disk.
void fetch_lines(const uint16_t* tokens, int64_t count) {
  constexpr int64_t LINE = 32;  // tokens in the 64 bytes of a cache line
  for (int64_t i = 0; i < count; i += LINE) __builtin_prefetch(tokens + i);
}

}  // namespace

class MappedShard {
 public:
  explicit MappedShard(const ShardSpec& spec) : path(spec.path), n_tokens(spec.n_tokens) {
    if (spec.n_tokens < 1 || spec.n_tokens > MAX_TOKENS || spec.offset < 0 ||
        spec.offset > MAX_TOKENS || spec.offset % 2 != 0) {
      throw std::invalid_argument(join("shard ", path, ": needs n_tokens in [1, ", MAX_TOKENS,
                                       "] and an even offset >= 0, got n_tokens ", n_tokens,
                                       " and offset ", spec.offset));
    }
    fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd_ < 0) {
      const char* remedy =
          errno == EMFILE ? "; raise the limit (ulimit -n) or make larger shards" : "";
      throw FileError(errno, join(std::strerror(errno), remedy), path);
    }
    bytes_ = spec.offset + 2 * spec.n_tokens;
    try {
      modified_ns_ = modified_ns();
      map_ = mmap(nullptr, static_cast<size_t>(bytes_), PROT_READ, MAP_SHARED, fd_, 0);
      if (map_ == MAP_FAILED) {
        throw FileError(errno, join("cannot map the file: ", std::strerror(errno)), path);
      }
    } catch (...) {
      close(fd_);
      throw;
    }
    // Windows are read in random order: the kernel's own read-ahead would fetch what is not wanted.
    madvise(map_, static_cast<size_t>(bytes_), MADV_RANDOM);
    tokens = reinterpret_cast<const uint16_t*>(static_cast<const char*>(map_) + spec.offset);
  }
  ~MappedShard() {
    munmap(map_, static_cast<size_t>(bytes_));
    close(fd_);
  }
  MappedShard(const MappedShard&) = delete;
  MappedShard& operator=(const MappedShard&) = delete;

  // Throws if the file got shorter since it was mapped, or was written to.
  void check_unchanged() const {
    if (modified_ns() != modified_ns_) {
      throw FileError(EIO,
                      "the file was written to while it is in use, so its tokens may not be those "
                      "of this run any more; start again from the last checkpoint",
                      path);
    }
  }

  const std::string path;
  const int64_t n_tokens;
  const uint16_t* tokens;

 private:
  int fd_;
  void* map_;
  int64_t bytes_, modified_ns_;

  // When the file was written to. Throws if it is too short.
  int64_t modified_ns() const {
    struct stat info{};
    if (fstat(fd_, &info) != 0) throw FileError(errno, std::strerror(errno), path);
    if (info.st_size < bytes_) {
      throw FileError(EIO,
                      join("the file has ", info.st_size, " bytes but its tokens need ", bytes_,
                           "; it was cut short or is being rewritten. Prepare the data again"),
                      path);
    }
    return int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec;
  }
};

TokenLoader::TokenLoader(const std::vector<ShardSpec>& shards, int64_t block_size, uint64_t seed,
                         bool shuffle, int64_t vocab_size)
    : block_size_(block_size), seed_(seed), shuffle_(shuffle), vocab_size_(vocab_size) {
  if (block_size < 1 || block_size > MAX_BLOCK) {
    throw std::invalid_argument(
        join("block_size must be at least 1 and at most ", MAX_BLOCK, ", got ", block_size));
  }
  if (shards.empty()) throw std::invalid_argument("no shards given");
  static const bool installed = install_handler();
  static_cast<void>(installed);
  starts_.push_back(0);
  for (const ShardSpec& spec : shards) {
    shards_.push_back(std::make_shared<MappedShard>(spec));
    starts_.push_back(starts_.back() + spec.n_tokens);
  }
  // With shuffling every epoch shifts its windows by up to block_size - 1 tokens, and that room is
  // kept free.
  n_windows_ = (n_tokens() - (shuffle ? block_size : 1)) / block_size;
  if (n_windows_ < 1) {
    const char* hold = shards_.size() > 1 ? " and the other shards hold " : ": holds ";
    throw std::invalid_argument(join(shards_[0]->path, hold, n_tokens(), " tokens, but block_size ",
                                     block_size, " needs at least ",
                                     shuffle ? 2 * block_size : block_size + 1,
                                     ": use a smaller block_size or more text"));
  }
}

int64_t TokenLoader::window_start(int64_t sample) const {
  if (sample < 0) throw std::invalid_argument(join("sample must not be negative, got ", sample));
  const int64_t epoch = sample / n_windows_, index = sample % n_windows_;
  if (!shuffle_) return index * block_size_;
  const uint64_t key = epoch_key(seed_, epoch);
  const int64_t shift = static_cast<int64_t>(mix(key) % static_cast<uint64_t>(block_size_));
  return permute(index, n_windows_, key) * block_size_ + shift;
}

TokenLoader::Piece TokenLoader::piece(int64_t position, int64_t count) const {
  const size_t s =
      std::upper_bound(starts_.begin(), starts_.end(), position) - starts_.begin() - 1;
  const int64_t offset = position - starts_[s];
  count = std::min(count, shards_[s]->n_tokens - offset);
  return {s, offset, count, shards_[s]->tokens + offset};
}

void TokenLoader::fill(const int64_t* samples, int64_t rows, int64_t* x, int64_t* y,
                       int32_t* doc_start, int64_t eot) const {
  const int64_t faults = major_faults();
  std::vector<char> touched(shards_.size(), 0);
  int64_t next = 0;  // where the next row begins
  for (int64_t row = 0; row < rows; ++row, x += block_size_, y += block_size_) {
    if (samples[row] == SKIP) continue;
    const int64_t start = row > 0 && samples[row - 1] != SKIP ? next : window_start(samples[row]);
    if (row + 1 < rows && samples[row + 1] != SKIP) {
      next = window_start(samples[row + 1]);
      const Piece ahead = piece(next, block_size_ + 1);
      fetch_lines(ahead.tokens, ahead.count);
    }
    // The window's block_size + 1 tokens may lie in several shards; `done` counts those already
    // widened.
    for (int64_t done = 0; done <= block_size_;) {
      const auto [s, offset, count, source] = piece(start + done, block_size_ + 1 - done);
      touched[s] = 1;
      const int64_t x_count = std::min(count, block_size_ - done);  // the last is a target only
      const int64_t skip = done == 0 ? 1 : 0;  // the first token is an input only
      const int32_t largest = widen_guarded(source, count, x + done, x_count, y + done, skip);
      if (largest < 0 || largest >= vocab_size_) {
        const MappedShard& shard = *shards_[s];
        shard.check_unchanged();
        if (largest < 0) throw FileError(EIO, "cannot be read: a fault of its disk", shard.path);
        int64_t i = 0;
        while (i < x_count && x[done + i] < vocab_size_) ++i;
        throw std::invalid_argument(
            join("shard ", shard.path, ": token ", offset + i, " is ",
                 i < x_count ? x[done + i] : y[block_size_ - 1], ", but the vocabulary has ",
                 vocab_size_, " entries: the file is damaged or was made with another tokenizer"));
      }
      done += count;
    }
    if (doc_start != nullptr) {
      int32_t* row_start = doc_start + row * block_size_;
      int32_t first = 0;
      for (int64_t i = 0; i < block_size_; ++i) {
        if (x[i] == eot) first = static_cast<int32_t>(i);
        row_start[i] = first;
      }
    }
  }
  // Once a batch, as a system call a row would cost as much as the copying; and after it, so that
  // no change of a file before this moment goes unnoticed.
  for (size_t s = 0; s < shards_.size(); ++s) {
    if (touched[s]) shards_[s]->check_unchanged();
  }
  if (major_faults() > faults) cold_batches_.store(COLD_BATCHES, std::memory_order_relaxed);
}

void TokenLoader::prefetch(const int64_t* samples, int64_t rows) const {
  const int cold = cold_batches_.load(std::memory_order_relaxed);
  if (cold == 0) return;
  cold_batches_.store(cold - 1, std::memory_order_relaxed);
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  for (int64_t row = 0; row < rows; ++row) {
    if (samples[row] == SKIP) continue;
    const Piece ahead = piece(window_start(samples[row]), block_size_ + 1);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(ahead.tokens) & ~(page - 1);
    const uintptr_t end = reinterpret_cast<uintptr_t>(ahead.tokens + ahead.count);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);  // advice only
  }
}

}  // namespace token_loader
