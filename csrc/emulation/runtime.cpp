// Fibers, barriers, collectives and memory of the emulation. Never instrumented for races.
#include "emulation/runtime.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "emulation/race.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulation switches stacks in x86-64 assembly, on Linux; CMakeLists.txt leaves it out elsewhere"
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the callee-saved registers on the current stack and the stack pointer in *save, then resumes the stack `load`.
// Takes 7 ns; ucontext takes 30 times as long, because it saves the signal mask by a system call.
extern "C" void rqk_switch_stack(void** save, void* load);
asm(R"(
.text
.hidden rqk_switch_stack
.globl rqk_switch_stack
.type rqk_switch_stack, @function
rqk_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rqk_switch_stack, .-rqk_switch_stack
)");

namespace rqk::emulation {
namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxStaticShared = 48 * 1024;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;

// --- random numbers ------------------------------------------------------------------------------------

struct Random {
  uint64_t state = 0;
  // splitmix64
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  uint32_t below(uint64_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }
};

uint64_t schedule_seed = 0;

// --- stacks --------------------------------------------------------------------------------------------

// A stack with a guard page below it; reused by the next block.
struct Stack {
  Stack() {
    void* all = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    mprotect(all, kGuardBytes, PROT_NONE);
    bottom = static_cast<char*>(all) + kGuardBytes;
  }
  char* bottom;
};

std::vector<Stack>& stacks() {
  static std::vector<Stack> all;
  return all;
}

// --- one launch ----------------------------------------------------------------------------------------

enum class State { ready, at_barrier, at_exchange, returned };

// A copy that was started and not yet waited for; a null destination ends a group.
struct AsyncCopy {
  void* shared;
  const void* global;
  size_t copied, bytes;
  Site site;
  const void* pc;
};

struct Fiber {
  void* stack_pointer = nullptr;
  void* asan_fake_stack = nullptr;
  const char* stack_bottom = nullptr;
  uint3 index{};
  unsigned linear = 0;
  State state = State::ready;
  // What the fiber waits for.
  Site site{};
  const char* waits_in = nullptr;
  uint32_t mask = 0;
  void* argument = nullptr;
  std::vector<AsyncCopy> copies;
};

struct SharedVariable {
  const void* key;
  const char* name;
  size_t bytes;
  char* allocation;
  char* data;
};

struct Launch {
  const char* name;
  dim3 block;
  void (*thread)(void*);
  void* context;
  std::vector<Fiber> fibers;
  Fiber* running = nullptr;
  void* main_stack_pointer = nullptr;
  void* main_fake_stack = nullptr;
  const void* main_bottom = nullptr;
  size_t main_bytes = 0;

  // Ready fibers in order, in a ring buffer with room for all.
  unsigned wrapped(unsigned i) const { return i < ready.size() ? i : i - static_cast<unsigned>(ready.size()); }
  std::vector<unsigned> ready;
  unsigned first_ready = 0, num_ready = 0;
  Random random;
  bool latest_first = false;

  // Lanes of each warp that wait in a collective, and lanes that have returned or do not exist.
  struct Warp {
    uint32_t waiting = 0, absent = 0;
  };
  std::vector<Warp> warps;

  unsigned live = 0;
  unsigned at_barrier = 0;
  Barrier barrier_kind = Barrier::plain;
  Site barrier_site{};
  unsigned predicates = 0;
  int barrier_result = 0;

  std::vector<SharedVariable> shared;
  size_t static_shared_bytes = 0, dynamic_shared_bytes = 0, most_shared_bytes = 0;
  std::string error;
};

Launch* current = nullptr;  // null outside of launches
bool from_main = false;

// Formats thread numbers as ranges: "0-31, 64"
std::string ranges(const std::vector<unsigned>& threads) {
  std::string text;
  for (size_t i = 0; i < threads.size();) {
    size_t j = i;
    while (j + 1 < threads.size() && threads[j + 1] == threads[j] + 1) ++j;
    if (!text.empty()) text += ", ";
    text += std::to_string(threads[i]);
    if (j > i) text += "-" + std::to_string(threads[j]);
    i = j + 1;
  }
  return text;
}

std::string hex(uint32_t value) {
  char text[16];
  snprintf(text, sizeof(text), "0x%08x", value);
  return text;
}

// --- switching -----------------------------------------------------------------------------------------

void before_switch([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* bottom,
                   [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
#endif
}

void after_switch([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &bytes);
  if (from_main) {
    current->main_bottom = bottom;
    current->main_bytes = bytes;
  }
#endif
  from_main = false;
}

void enter(Fiber& fiber) {
  current->running = &fiber;
  threadIdx = fiber.index;
  race::set_thread(fiber.linear);
}

// `leaving`: where to save the current stack; null for a fiber that will not run again.
void switch_to_main(Fiber& leaving, bool returned) {
  before_switch(returned ? nullptr : &leaving.asan_fake_stack, current->main_bottom, current->main_bytes);
  rqk_switch_stack(&leaving.stack_pointer, current->main_stack_pointer);
}

void switch_to(Fiber& leaving, Fiber& next, bool returned) {
  enter(next);
  before_switch(returned ? nullptr : &leaving.asan_fake_stack, next.stack_bottom, kStackBytes);
  rqk_switch_stack(&leaving.stack_pointer, next.stack_pointer);
  after_switch(leaving.asan_fake_stack);
}

void make_ready(Fiber& fiber) {
  Launch& l = *current;
  fiber.state = State::ready;
  l.ready[l.wrapped(l.first_ready + l.num_ready++)] = fiber.linear;
}

// Picks a ready fiber: the first in order, or depending on the seed a random one or mostly the latest, so that some
// warps run far ahead.
Fiber* take_ready() {
  Launch& l = *current;
  if (l.num_ready == 0) return nullptr;
  if (schedule_seed != 0) {
    const bool any = !l.latest_first || l.random.below(8) == 0;
    const unsigned pick = any ? l.random.below(l.num_ready) : l.num_ready - 1;
    std::swap(l.ready[l.wrapped(l.first_ready + pick)], l.ready[l.first_ready]);
  }
  Fiber& fiber = l.fibers[l.ready[l.first_ready]];
  l.first_ready = l.wrapped(l.first_ready + 1);
  --l.num_ready;
  return &fiber;
}

// Describes which threads wait where, for a launch that cannot continue.
std::string waiting_threads() {
  Launch& l = *current;
  std::string text;
  std::vector<bool> told(l.fibers.size());
  for (const Fiber& first : l.fibers) {
    if (told[first.linear] || first.state == State::returned || first.state == State::ready) continue;
    std::vector<unsigned> threads;
    for (const Fiber& other : l.fibers) {
      if (other.state == first.state && other.mask == first.mask && other.site.line() == first.site.line() &&
          other.site.column() == first.site.column() && other.waits_in == first.waits_in) {
        threads.push_back(other.linear);
        told[other.linear] = true;
      }
    }
    text += "\n  threads " + ranges(threads) + " wait in " + first.waits_in;
    if (first.state == State::at_exchange) text += " of mask " + hex(first.mask);
    text += " at " + describe(first.site);
  }
  std::vector<unsigned> returned;
  for (const Fiber& fiber : l.fibers) {
    if (fiber.state == State::returned) returned.push_back(fiber.linear);
  }
  if (!returned.empty()) text += "\n  threads " + ranges(returned) + " have returned";
  return text;
}

// Runs other fibers until this one is picked again; it must be waiting or in the ready ring.
void wait(Fiber& self) {
  Fiber* next = take_ready();
  if (next == nullptr) fail("deadlock:" + waiting_threads());
  if (next != &self) switch_to(self, *next, false);
}

// --- barriers ------------------------------------------------------------------------------------------

const char* name_of(Barrier kind) {
  switch (kind) {
    case Barrier::count:
      return "__syncthreads_count";
    case Barrier::all:
      return "__syncthreads_and";
    case Barrier::any:
      return "__syncthreads_or";
    default:
      return "__syncthreads";
  }
}

void complete_barrier_if_all_are_here() {
  Launch& l = *current;
  if (l.at_barrier == 0 || l.at_barrier != l.live) return;
  switch (l.barrier_kind) {
    case Barrier::all:
      l.barrier_result = l.predicates == l.at_barrier;
      break;
    case Barrier::any:
      l.barrier_result = l.predicates > 0;
      break;
    default:
      l.barrier_result = static_cast<int>(l.predicates);
  }
  l.at_barrier = 0;
  l.predicates = 0;
  race::block_barrier();
  for (Fiber& fiber : l.fibers) {
    if (fiber.state == State::at_barrier) make_ready(fiber);
  }
}

// --- the life of a fiber -------------------------------------------------------------------------------

void fiber_main() {
  after_switch(nullptr);
  current->thread(current->context);

  Launch& l = *current;
  Fiber& self = *l.running;
  self.state = State::returned;
  --l.live;
  if (!self.copies.empty()) {
    fail("thread " + std::to_string(self.linear) + " returned without waiting for its cp.async" +
         (self.copies.front().shared == nullptr ? "" : " at " + describe(self.copies.front().site)));
  }
  const unsigned lane = self.linear % kWarp;
  l.warps[self.linear / kWarp].absent |= 1u << lane;
  for (unsigned t = self.linear - lane; t < self.linear - lane + kWarp && t < l.fibers.size(); ++t) {
    const Fiber& other = l.fibers[t];
    if (other.state == State::at_exchange && (other.mask >> lane & 1) != 0) {
      fail("thread " + std::to_string(self.linear) + " returned, but is in the mask " + hex(other.mask) + " of " +
           other.waits_in + " at " + describe(other.site) + ", where thread " + std::to_string(t) + " waits");
    }
  }
  complete_barrier_if_all_are_here();
  Fiber* next = take_ready();
  if (next == nullptr) {
    if (l.live > 0) fail("deadlock:" + waiting_threads());
    switch_to_main(self, true);
  } else {
    switch_to(self, *next, true);
  }
  std::abort();  // a fiber that has returned never runs again
}

void prepare(Fiber& fiber, const Stack& stack) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack.bottom, kStackBytes);  // frames of an earlier block that never returned
#endif
  fiber.stack_bottom = stack.bottom;
  fiber.asan_fake_stack = nullptr;
  // Stacks a power of two apart would all fall into the same cache sets.
  const size_t colour = fiber.linear % 61 * 192;
  char* top = stack.bottom + kStackBytes - colour;
  void** words = reinterpret_cast<void**>(top) - 8;
  std::memset(words, 0, 64);  // six registers, the address to "return" to, and that one's own return address
  words[6] = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = words;
}

void fill_shared(Launch& l) {
  for (const SharedVariable& variable : l.shared) std::memset(variable.data, 0xff, variable.bytes);
}

void run_block(Launch& l, uint3 index, uint32_t linear) {
  blockIdx = index;
  l.live = static_cast<unsigned>(l.fibers.size());
  l.at_barrier = l.predicates = 0;
  l.first_ready = l.num_ready = 0;
  l.latest_first = schedule_seed != 0 && l.random.below(2) == 0;
  fill_shared(l);
  race::begin_block(linear, l.live);
  for (size_t w = 0; w < l.warps.size(); ++w) {
    const size_t lanes = l.fibers.size() - w * kWarp;
    l.warps[w] = {0, lanes < kWarp ? ~0u << lanes : 0};
  }
  for (unsigned t = 0; t < l.fibers.size(); ++t) {
    Fiber& fiber = l.fibers[t];
    fiber.linear = t;
    fiber.copies.clear();
    fiber.index = {t % l.block.x, t / l.block.x % l.block.y, t / (l.block.x * l.block.y)};
    prepare(fiber, stacks()[t]);
    make_ready(fiber);
  }
  Fiber* first = take_ready();
  enter(*first);
  from_main = true;
  before_switch(&l.main_fake_stack, first->stack_bottom, kStackBytes);
  rqk_switch_stack(&l.main_stack_pointer, first->stack_pointer);
  from_main = false;
  after_switch(l.main_fake_stack);
  if (!l.error.empty()) {
    throw Error(std::string(l.name) + ", block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
                std::to_string(index.z) + "): " + l.error);
  }
}

// --- memory --------------------------------------------------------------------------------------------

// Allocates exactly `bytes` of shared memory, misaligned by 8 or 16 bytes beyond the declared alignment: a kernel that
// loads vectors from it must declare that.
SharedVariable& add_shared(Launch& l, const void* key, const char* name, size_t bytes, size_t alignment) {
  const size_t shift = alignment <= 8 ? 8 : alignment == 16 ? 16 : 0;
  void* allocation = nullptr;
  if (posix_memalign(&allocation, 256, bytes + shift) != 0) throw std::bad_alloc();
  char* data = static_cast<char*>(allocation) + shift;
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(allocation, shift);
#endif
  std::memset(data, 0xff, bytes);
  race::add_region(data, bytes, name, /*shared=*/true, /*initialised=*/false);
  l.shared.push_back({key, name, bytes, static_cast<char*>(allocation), data});
  return l.shared.back();
}

void free_shared(Launch& l) {
  for (const SharedVariable& variable : l.shared) {
    race::remove_region(variable.data);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(variable.allocation, variable.data - variable.allocation);
#endif
    std::free(variable.allocation);
  }
  l.shared.clear();
}

void check_limits(const char* name, dim3 grid, dim3 block, size_t dynamic_shared, size_t most_shared) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  auto text = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  if (threads == 0 || threads > kMaxThreads || block.z > 64) {
    fail(std::string(name) + ": a block has 1 to 1024 threads, at most 64 in z; got " + text(block));
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) {
    fail(std::string(name) + ": a grid has 1 to (2147483647, 65535, 65535) blocks; got " + text(grid));
  }
  if (dynamic_shared > most_shared) {
    fail(std::string(name) + ": a block has at most " + std::to_string(most_shared) +
         " bytes of shared memory; the launch asks for " + std::to_string(dynamic_shared));
  }
}

}  // namespace

// --- what runtime.h offers ----------------------------------------------------------------------------

void fail(const std::string& message) {
  if (current == nullptr || current->running == nullptr) throw Error(message);
  current->error = message;
  switch_to_main(*current->running, false);
  std::abort();
}

std::string describe(const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return std::string(slash == nullptr ? site.file_name() : slash + 1) + ":" + std::to_string(site.line()) + ":" +
         std::to_string(site.column());
}

void set_schedule(uint64_t seed) { schedule_seed = seed; }

Device& device() {
  static Device of_this_process;
  return of_this_process;
}

int64_t strided_grid(int64_t items) { return schedule_seed != 0 && schedule_seed % 2 == 0 ? (items + 2) / 3 : items; }

void launch(const char* name, dim3 grid, dim3 block, size_t dynamic_shared, size_t most_shared, void (*thread)(void*),
            void* context) {
  check_limits(name, grid, block, dynamic_shared, most_shared);
  if (current != nullptr) fail(std::string(name) + ": launched from inside a kernel");
  Launch l{};
  l.name = name;
  l.block = block;
  l.thread = thread;
  l.context = context;
  l.most_shared_bytes = most_shared;
  l.random.state = schedule_seed;
  l.fibers.resize(size_t{block.x} * block.y * block.z);
  l.ready.resize(l.fibers.size());
  l.warps.resize((l.fibers.size() + kWarp - 1) / kWarp);
  while (stacks().size() < l.fibers.size()) stacks().emplace_back();
  blockDim = block;
  gridDim = grid;

  // Cleans up however the launch ends.
  struct Scope {
    explicit Scope(Launch& l) : launch(l) {
      current = &l;
      race::begin_launch();
    }
    ~Scope() {
      free_shared(launch);
      race::end_launch();
      current = nullptr;
    }
    Launch& launch;
  } scope(l);

  if (dynamic_shared > 0) {
    // 16-byte aligned, as CU_DYN_SMEM declares it.
    add_shared(l, nullptr, "dynamic shared memory", dynamic_shared, 16);
    l.dynamic_shared_bytes = dynamic_shared;
  }
  std::vector<uint32_t> order(size_t{grid.x} * grid.y * grid.z);
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  for (size_t i = order.size(); schedule_seed != 0 && i > 1; --i) std::swap(order[i - 1], order[l.random.below(i)]);
  for (const uint32_t i : order) run_block(l, {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)}, i);
}

DeviceBuffer::DeviceBuffer(size_t bytes, const void* host) : data_(nullptr), bytes_(bytes) {
  if (posix_memalign(&data_, 256, bytes) != 0) throw std::bad_alloc();
  if (bytes == 0) return;
  if (host == nullptr) {
    std::memset(data_, 0xff, bytes);
  } else {
    std::memcpy(data_, host, bytes);
  }
  race::add_region(data_, bytes, "global memory", /*shared=*/false, host != nullptr);
}

DeviceBuffer::~DeviceBuffer() {
  race::remove_region(data_);
  std::free(data_);
}

void* shared_variable(const void* key, const char* name, size_t bytes, size_t alignment) {
  Launch& l = *current;
  for (const SharedVariable& variable : l.shared) {
    if (variable.key == key) return variable.data;
  }
  l.static_shared_bytes += bytes;
  if (l.static_shared_bytes > kMaxStaticShared) {
    fail("static shared memory is limited to " + std::to_string(kMaxStaticShared) + " bytes; with " + name +
         " the kernel declares " + std::to_string(l.static_shared_bytes));
  }
  if (l.static_shared_bytes + l.dynamic_shared_bytes > l.most_shared_bytes) {
    fail("a block has at most " + std::to_string(l.most_shared_bytes) + " bytes of shared memory; with " + name +
         " the kernel uses " + std::to_string(l.static_shared_bytes + l.dynamic_shared_bytes));
  }
  return add_shared(l, key, name, bytes, alignment).data;
}

void* dynamic_shared() {
  for (const SharedVariable& variable : current->shared) {
    if (variable.key == nullptr) return variable.data;
  }
  // As on a device, an address that must not be read.
  return nullptr;
}

int block_barrier(Barrier kind, bool predicate, const Site& site) {
  Launch& l = *current;
  Fiber& self = *l.running;
  if (l.at_barrier > 0 &&
      (kind != l.barrier_kind || site.line() != l.barrier_site.line() || site.column() != l.barrier_site.column())) {
    fail("divergent barrier: thread " + std::to_string(self.linear) + " arrives in " + name_of(kind) + " at " +
         describe(site) + " while" + waiting_threads());
  }
  l.barrier_kind = kind;
  l.barrier_site = site;
  ++l.at_barrier;
  l.predicates += predicate;
  self.state = State::at_barrier;
  self.site = site;
  self.waits_in = name_of(kind);
  self.mask = 0;
  complete_barrier_if_all_are_here();
  wait(self);
  return l.barrier_result;
}

unsigned lane_index() { return current->running->linear % kWarp; }

void warp_exchange(uint32_t mask, const char* kind, void* argument, void (*combine)(const Lanes&), const Site& site) {
  Launch& l = *current;
  Fiber& self = *l.running;
  const unsigned lane = self.linear % kWarp;
  Fiber* warp = &self - lane;
  Launch::Warp& here = l.warps[self.linear / kWarp];
  if ((mask >> lane & 1) == 0 || (mask & here.absent) != 0) {
    const std::string text =
        "thread " + std::to_string(self.linear) + " in " + kind + " of mask " + hex(mask) + " at " + describe(site);
    if ((mask >> lane & 1) == 0) fail(text + " is not in the mask itself");
    const unsigned gone = self.linear - lane + static_cast<unsigned>(__builtin_ctz(mask & here.absent));
    fail(text + ": thread " + std::to_string(gone) + " of the mask " +
         (gone < l.fibers.size() ? "has returned" : "is beyond the block"));
  }
  self.state = State::at_exchange;
  self.site = site;
  self.waits_in = kind;
  self.mask = mask;
  self.argument = argument;
  here.waiting |= 1u << lane;

  // Lanes that wait in a different collective are found when all lanes of the mask wait, or by deadlock.
  if ((mask & ~here.waiting) == 0) {
    Lanes lanes{mask, {}};
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      const int other = __builtin_ctz(rest);
      const Fiber& fiber = warp[other];
      if (fiber.mask != mask || std::strcmp(fiber.waits_in, kind) != 0 || fiber.site.line() != site.line() ||
          fiber.site.column() != site.column()) {
        fail("divergent collective:" + waiting_threads());
      }
      lanes.argument[other] = fiber.argument;
    }
    combine(lanes);
    here.waiting &= ~mask;
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) make_ready(warp[__builtin_ctz(rest)]);
  }
  wait(self);
}

void warp_barrier(uint32_t mask, const Site& site) {
  int nothing = 0;
  warp_exchange(mask, "__syncwarp", &nothing, [](const Lanes& lanes) { race::warp_barrier(lanes.mask); }, site);
}

uint64_t warp_shuffle(uint32_t mask, const char* kind, Shuffle argument, const Site& site) {
  struct Argument {
    Shuffle shuffle;
    uint64_t result;
    const char* kind;
    const Site* site;
  } mine{argument, 0, kind, &site};
  warp_exchange(
      mask, kind, &mine,
      [](const Lanes& lanes) {
        for (unsigned lane = 0; lane < kWarp; ++lane) {
          auto* to = static_cast<Argument*>(lanes.argument[lane]);
          if (to == nullptr) continue;
          const auto* from = static_cast<const Argument*>(lanes.argument[to->shuffle.source]);
          if (from == nullptr) {
            fail(std::string(to->kind) + " at " + describe(*to->site) + ": lane " + std::to_string(lane) +
                 " reads lane " + std::to_string(to->shuffle.source) + ", which is not in the mask " + hex(lanes.mask));
          }
          to->result = from->shuffle.value;
        }
      },
      site);
  return mine.result;
}

void before_atomic(void* address, size_t bytes, const void* pc) {
  if (schedule_seed != 0 && current->random.below(4) == 0) {
    Fiber& self = *current->running;
    make_ready(self);
    wait(self);
  }
  race::atomic(address, bytes, pc);
}

namespace {

// True if the bytes lie within one variable of this block. For other addresses, a device would use the lower half as a
// shared address.
bool is_shared(const void* address, size_t bytes) {
  const char* first = static_cast<const char*>(address);
  for (const SharedVariable& variable : current->shared) {
    if (first >= variable.data && first + bytes <= variable.data + variable.bytes) return true;
  }
  return false;
}

}  // namespace

void async_copy(void* shared, const void* global, size_t copied, size_t bytes, const Site& site) {
  Fiber& self = *current->running;
  const std::string where = "cp.async at " + describe(site) + " by thread " + std::to_string(self.linear);
  if (!is_shared(shared, bytes)) fail(where + ": the destination is not within one shared variable");
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0 || reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    fail(where + ": both addresses must be aligned to " + std::to_string(bytes) + " bytes");
  }
  const void* pc = __builtin_return_address(0);
  race::read(global, copied, pc);
  race::poison(shared, bytes, pc);
  std::memset(shared, 0xff, bytes);
  self.copies.push_back({shared, global, copied, bytes, site, pc});
}

void async_commit() { current->running->copies.push_back({}); }

void async_wait(size_t pending_groups) {
  std::vector<AsyncCopy>& copies = current->running->copies;
  size_t groups = 0;
  for (const AsyncCopy& copy : copies) groups += copy.shared == nullptr;
  size_t done = 0;
  // Groups complete in order and as a whole; uncommitted copies are not waited for.
  for (; groups > pending_groups; ++done) {
    const AsyncCopy& copy = copies[done];
    if (copy.shared == nullptr) {
      --groups;
      continue;
    }
    race::write(copy.shared, copy.bytes, copy.pc);
    std::memset(copy.shared, 0, copy.bytes);
    if (copy.copied > 0) std::memcpy(copy.shared, copy.global, copy.copied);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
}

void load_matrices(uint32_t (&d)[4], const void* row, bool transpose, const Site& site) {
  constexpr size_t kRowBytes = 16;
  if (reinterpret_cast<uintptr_t>(row) % kRowBytes != 0) {
    fail("ldmatrix at " + describe(site) + ": rows must be aligned to 16 bytes");
  }
  if (!is_shared(row, kRowBytes)) fail("ldmatrix at " + describe(site) + ": a row is not within one shared variable");
  // The read belongs to this lane, wherever the elements go.
  race::read(row, kRowBytes, __builtin_return_address(0));
  struct Argument {
    uint16_t row[8];
    bool transpose;
    uint32_t (&d)[4];
  } mine{{}, transpose, d};
  std::memcpy(mine.row, row, kRowBytes);
  warp_exchange(
      0xffffffffu, transpose ? "ldmatrix.trans" : "ldmatrix", &mine,
      [](const Lanes& lanes) {
        for (unsigned lane = 0; lane < kWarp; ++lane) {
          auto* to = static_cast<Argument*>(lanes.argument[lane]);
          for (unsigned i = 0; i < 4; ++i) {
            auto element = [&](unsigned r, unsigned c) {
              if (to->transpose) std::swap(r, c);
              return uint32_t{static_cast<const Argument*>(lanes.argument[8 * i + r])->row[c]};
            };
            const unsigned r = lane / 4, c = lane % 4 * 2;
            to->d[i] = element(r, c) | element(r, c + 1) << 16;
          }
        }
      },
      site);
}

namespace {

double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const double fraction = bits & 1023;
  double magnitude = 0;
  if (exponent == 31) {
    magnitude = fraction == 0 ? HUGE_VAL : std::nan("");
  } else {
    magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  }
  return bits >> 15 != 0 ? -magnitude : magnitude;
}

// Element j of a register.
double element_value(Element type, uint32_t word, unsigned j) {
  auto as_float = [](uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return double{value};
  };
  switch (type) {
    case Element::bf16:
      return as_float((word >> 16 * j & 0xffffu) << 16);
    case Element::f16:
      return half_value(static_cast<uint16_t>(word >> 16 * j));
    case Element::tf32:
      return as_float(word & 0xffffe000u);
    default:
      return static_cast<int8_t>(word >> 8 * j);
  }
}

}  // namespace

void multiply_matrices(Element type, void* d, const uint32_t (&a)[4], const uint32_t (&b)[2], const void* c,
                       const Site& site) {
  struct Argument {
    Element type;
    void* d;
    const uint32_t *a, *b;
    const void* c;
  } mine{type, d, a, b, c};
  static constexpr const char* kNames[] = {"mma bf16", "mma f16", "mma tf32", "mma s8"};
  warp_exchange(
      0xffffffffu, kNames[static_cast<int>(type)], &mine,
      [](const Lanes& lanes) {
        constexpr unsigned kRows = 16, kColumns = 8, kMaxDepth = 32;
        auto lane_of = [&](unsigned lane) { return static_cast<const Argument*>(lanes.argument[lane]); };
        const Element type = lane_of(0)->type;
        const unsigned per_word = type == Element::s8 ? 4 : type == Element::tf32 ? 1 : 2, depth = 8 * per_word;
        double a_mk[kRows][kMaxDepth], b_kn[kMaxDepth][kColumns];
        // Collect the matrices from the lanes' fragments.
        for (unsigned lane = 0; lane < kWarp; ++lane) {
          const unsigned group = lane / 4, first = lane % 4 * per_word;
          for (unsigned j = 0; j < per_word; ++j) {
            for (unsigned i = 0; i < 4; ++i) {
              a_mk[group + i % 2 * 8][first + j + i / 2 * 4 * per_word] = element_value(type, lane_of(lane)->a[i], j);
            }
            for (unsigned i = 0; i < 2; ++i) {
              b_kn[first + j + i * 4 * per_word][group] = element_value(type, lane_of(lane)->b[i], j);
            }
          }
        }
        // Each lane's elements of the product.
        for (unsigned lane = 0; lane < kWarp; ++lane) {
          for (unsigned i = 0; i < 4; ++i) {
            const unsigned m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
            double sum = 0, magnitudes = 0;
            for (unsigned k = 0; k < depth; ++k) {
              const double product = a_mk[m][k] * b_kn[k][n];
              sum += product;
              magnitudes += std::fabs(product);
            }
            if (type == Element::s8) {
              // Wraps around, like the device without .satfinite; the products of 32 int8 fit.
              const auto start = static_cast<uint32_t>(static_cast<const int32_t*>(lane_of(lane)->c)[i]);
              static_cast<int32_t*>(lane_of(lane)->d)[i] =
                  static_cast<int32_t>(start + static_cast<uint32_t>(static_cast<int32_t>(sum)));
            } else {
              const double start = static_cast<const float*>(lane_of(lane)->c)[i];
              if (device().mma_error > 0 && std::isfinite(start)) {
                const double error = device().mma_error * (magnitudes + std::fabs(start));
                sum += current->random.below(2) == 0 ? error : -error;
              }
              static_cast<float*>(lane_of(lane)->d)[i] = static_cast<float>(start + sum);
            }
          }
        }
      },
      site);
}

}  // namespace rqk::emulation
