// Runs a kernel launch on the host: each CUDA thread of a block is a fiber, and blocks run one after another.
//
// Checks what CUDA leaves undefined: limits of a launch, barriers and warp collectives that not all threads reach,
// deadlocks, and in the race build conflicting accesses. A violation ends the launch with an Error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace rqk::emulation {

using Site = std::source_location;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Ends the launch (from a CUDA thread) or throws Error (from outside).
[[noreturn]] void fail(const std::string& message);

// "kernel.cuh:88:7"
std::string describe(const Site& site);

// The order in which blocks and threads run: 0 in order, anything else seeds a shuffle.
void set_schedule(uint64_t seed);

// Number of blocks for a kernel that works with any number: `items`, or fewer under every second seed.
int64_t strided_grid(int64_t items);

// Properties of the emulated device, by default an H100; launches respect them.
struct Device {
  int multiprocessors = 132;
  int shared_bytes = 227 * 1024;  // per block
  // Relative error of a float mma: its result is off by this fraction of the sum of its terms' magnitudes, up or down
  // at random. The rounding of a real device is not documented, so a kernel's assumption can be tested.
  double mma_error = 0;
};
Device& device();

// --- launches and memory -------------------------------------------------------------------------------

// `most_shared`: maximum bytes of shared memory per block, static and dynamic.
void launch(const char* name, dim3 grid, dim3 block, size_t dynamic_shared, size_t most_shared, void (*thread)(void*),
            void* context);

template <class Thread>
void launch(const char* name, dim3 grid, dim3 block, size_t dynamic_shared, size_t most_shared, const Thread& thread) {
  launch(
      name, grid, block, dynamic_shared, most_shared, [](void* t) { (*static_cast<const Thread*>(t))(); },
      const_cast<Thread*>(&thread));
}

// Global memory of exactly the requested size, 256-byte aligned, filled with 0xFF (NaN, -1) unless the host gives data.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes, const void* host = nullptr);
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* data_;
  size_t bytes_;
};

// This block's copy of the shared variable identified by `key`; 0xFF at the start of each block.
void* shared_variable(const void* key, const char* name, size_t bytes, size_t alignment);
void* dynamic_shared();

// --- barriers and collectives --------------------------------------------------------------------------

enum class Barrier { plain, count, all, any };

// __syncthreads and its variants. Completes when every thread that has not returned is here, all at the same site.
int block_barrier(Barrier kind, bool predicate, const Site& site);

// The arguments that the lanes of a warp passed to a collective; null for lanes outside the mask.
struct Lanes {
  uint32_t mask;
  void* argument[32];
};

// Waits until all lanes of `mask` are here with the same kind, mask and site; then `combine` runs once on their
// arguments.
void warp_exchange(uint32_t mask, const char* kind, void* argument, void (*combine)(const Lanes&), const Site& site);

void warp_barrier(uint32_t mask, const Site& site);
unsigned lane_index();

// The value of lane `source`, which must take part.
struct Shuffle {
  uint64_t value;
  int source;
};
uint64_t warp_shuffle(uint32_t mask, const char* kind, Shuffle argument, const Site& site);

// --- instructions of common/ptx.cuh --------------------------------------------------------------------

// Until the thread has waited for the copy, the destination is 0xFF, and uninitialized for the race checker.
void async_copy(void* shared, const void* global, size_t copied, size_t bytes, const Site& site);
void async_commit();
void async_wait(size_t pending_groups);

void load_matrices(uint32_t (&d)[4], const void* row, bool transpose, const Site& site);

enum class Element { bf16, f16, tf32, s8 };
// d = a b + c. `c` and `d` are float[4], int32_t[4] for s8; they may be the same.
void multiply_matrices(Element type, void* d, const uint32_t (&a)[4], const uint32_t (&b)[2], const void* c,
                       const Site& site);

// Called before a read-modify-write, so that other threads may run first.
void before_atomic(void* address, size_t bytes, const void* pc);

}  // namespace rqk::emulation
