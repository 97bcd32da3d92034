// Reads fixed-length windows of tokens from memory-mapped shards.
//
// A shard is a file that holds n_tokens little-endian uint16 tokens from byte `offset` on. The
// shards, in the order given, form one stream of n_tokens() tokens. An epoch cuts the stream into
// n_windows() windows of block_size tokens; a window also needs the token after its last one, as
// the target of that position.
//
// Which window is sample i of the run is computed, not stored: epoch = i / n_windows(), and within
// an epoch a keyed permutation of [0, n_windows()) and a shift of all windows by less than
// block_size, both functions of (seed, epoch). So memory is constant, and any position is reached
// in constant time. gpt2/data/numpy_backend.py is the same in numpy; tests hold the two equal.
//
// All methods are const, and what they return depends on their arguments alone: any number of
// threads may share one loader.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace token_loader {

constexpr int64_t SKIP = -1;

struct ShardSpec {
  std::string path;
  int64_t offset;    // bytes before the first token, even
  int64_t n_tokens;  // at least 1
};

// A file that cannot be opened, mapped or trusted any more; becomes OSError(error_number, message,
// path) in Python.
struct FileError : std::runtime_error {
  FileError(int error_number, const std::string& message, const std::string& path)
      : std::runtime_error(message), error_number(error_number), path(path) {}
  int error_number;
  std::string path;
};

class MappedShard;  // a file mapped read-only for as long as the object lives

class TokenLoader {
 public:
  // vocab_size: a token beyond it throws std::invalid_argument when it is read; 65536 accepts every
  // uint16.
  TokenLoader(const std::vector<ShardSpec>& shards, int64_t block_size, uint64_t seed, bool shuffle,
              int64_t vocab_size);

  int64_t n_tokens() const { return starts_.back(); }
  int64_t n_windows() const { return n_windows_; }
  int64_t block_size() const { return block_size_; }

  // Position in the stream of the first token of sample `sample` >= 0.
  int64_t window_start(int64_t sample) const;
  // Writes sample samples[r] to row r: x[r, t] and y[r, t] = the token after x[r, t]; both (rows,
  // block_size). A row whose sample is SKIP stays as it is. doc_start (rows, block_size), if not
  // null: the index in its row of the first token of the document that x[r, t] belongs to; a
  // document begins with its token `eot`. What a row has before its first `eot` begins at 0.
  // Throws FileError for a shard that was cut, written to or could not be read meanwhile; a read
  // past the end of a mapped file, which ends a process with SIGBUS, is caught for this.
  void fill(const int64_t* samples, int64_t rows, int64_t* x, int64_t* y, int32_t* doc_start,
            int64_t eot) const;
  // Starts reading samples into the page cache and returns at once. Does so only after a fill had
  // to wait for the disk: where the pages are there already, asking for them takes half as long as
  // copying them.
  void prefetch(const int64_t* samples, int64_t rows) const;

 private:
  std::vector<std::shared_ptr<const MappedShard>> shards_;
  std::vector<int64_t> starts_;  // stream position of each shard's first token, then the total
  int64_t block_size_;
  uint64_t seed_;
  bool shuffle_;
  int64_t vocab_size_;
  int64_t n_windows_;

  mutable std::atomic<int> cold_batches_{0};  // prefetches that are still to be made; advice only

  // `count` tokens of the stream from a position on, or as many of them as its shard has.
  struct Piece {
    size_t shard;
    int64_t offset;  // in the shard
    int64_t count;
    const uint16_t* tokens;
  };
  Piece piece(int64_t position, int64_t count) const;
};

}  // namespace token_loader
