// The race checker. It stores for each byte the last write and two reads, with thread, block and time.
//
// Two accesses conflict if they are not ordered, at least one of them writes, and not both are atomic. Accesses of one
// thread are ordered; threads of a block are ordered by a block barrier (counted in epochs), lanes of a warp also by
// __syncwarp (vector clocks); blocks of a launch are not ordered; launches are. Writes of equal values conflict too.
#include "emulation/race.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "emulation/runtime.h"

namespace rqk::emulation::race {
namespace {

constexpr unsigned kWarp = 32;

struct Access {
  uint64_t pc = 0;
  uint32_t launch = 0;  // 0: no access yet
  uint32_t block = 0;
  uint32_t epoch = 0;
  uint32_t clock = 0;
  uint16_t thread = 0;
  bool atomic = false;
};

struct Byte {
  Access write;
  Access reads[2];
  bool written = false;  // ever, by any thread (for shared memory: in this block)
};

struct Region {
  const char* start;
  size_t bytes;
  const char* name;
  bool shared;
  std::unique_ptr<Byte[]> shadow;
};

struct Lane {
  uint32_t clock = 1;         // own time, incremented at each __syncwarp
  uint32_t seen[kWarp] = {};  // the times of other lanes that are visible to this one
};

std::vector<Region>& regions() {
  static std::vector<Region> all;
  return all;
}
size_t last_region = 0;

bool inside = false;  // a launch is running
uint32_t launch_number = 0, block = 0, epoch = 0;
unsigned thread = 0;
std::vector<Lane> lanes;  // of the block's threads

void clear(Region& region, bool written) {
  region.shadow = std::make_unique<Byte[]>(region.bytes);
  for (size_t i = 0; written && i < region.bytes; ++i) region.shadow[i].written = true;
}

Region* find(const char* address) {
  std::vector<Region>& all = regions();
  auto holds = [&](const Region& r) { return address >= r.start && address < r.start + r.bytes; };
  if (last_region < all.size() && holds(all[last_region])) return &all[last_region];
  for (size_t i = 0; i < all.size(); ++i) {
    if (holds(all[i])) {
      last_region = i;
      return &all[i];
    }
  }
  return nullptr;
}

bool concurrent(const Access& before) {
  if (before.launch != launch_number) return false;
  if (before.block != block) return true;
  if (before.epoch != epoch || before.thread == thread) return false;
  if (before.thread / kWarp != thread / kWarp) return true;
  return before.clock > lanes[thread].seen[before.thread % kWarp];
}

// Converts a code address to "kernel.cuh:88" by binutils; returns the address itself if that fails.
std::string line_of(uint64_t pc) {
  char command[128], text[512] = "";
  std::snprintf(command, sizeof(command), "addr2line -s -e /proc/%d/exe 0x%llx 2>/dev/null", getpid(),
                static_cast<unsigned long long>(pc - 1));
  if (FILE* pipe = popen(command, "r")) {
    if (std::fgets(text, sizeof(text), pipe) == nullptr) text[0] = '\0';
    pclose(pipe);
  }
  text[std::strcspn(text, " \n")] = '\0';
  if (text[0] == '\0' || text[0] == '?')
    std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(pc));
  return text;
}

std::string who(const Access& access, bool write) {
  return std::string(access.atomic ? "an atomic"
                     : write       ? "a write"
                                   : "a read") +
         " by thread " + std::to_string(access.thread) + " of block " + std::to_string(access.block) + " at " +
         line_of(access.pc);
}

std::string place(const Region& region, size_t offset) {
  return std::string(region.shared ? "shared " : "") + region.name + " (" + std::to_string(region.bytes) +
         " bytes) at byte " + std::to_string(offset);
}

void remember_read(Byte& byte, const Access& access) {
  // Keeps two reads of different warps if possible, so that no later write can be ordered after both by being in the
  // same warp.
  Access* slot = &byte.reads[1];
  for (Access& read : byte.reads) {
    if (read.launch != access.launch || read.block != access.block || read.epoch != access.epoch) slot = &read;
  }
  for (Access& read : byte.reads) {
    if (read.launch == access.launch && read.block == access.block && read.thread / kWarp == access.thread / kWarp) {
      slot = &read;
    }
  }
  *slot = access;
}

void check(const void* address, size_t bytes, bool reads, bool writes, bool atomic, const void* pc) {
  if (!inside) return;
  const char* first = static_cast<const char*>(address);
  Region* region = find(first);
  if (region == nullptr) return;  // a thread's own stack, or a constant
  const Access access{reinterpret_cast<uint64_t>(pc), launch_number, block, epoch, lanes[thread].clock,
                      static_cast<uint16_t>(thread),  atomic};
  for (size_t i = 0; i < bytes; ++i) {
    const size_t offset = static_cast<size_t>(first - region->start) + i;
    if (offset >= region->bytes) return;  // the address build reports accesses out of bounds
    Byte& byte = region->shadow[offset];
    auto conflict = [&](const Access& before, bool before_writes) {
      if ((before.atomic && atomic) || !concurrent(before)) return;
      fail("race on " + place(*region, offset) + ": " + who(access, writes) + " and, before it, " +
           who(before, before_writes));
    };
    if (reads && !byte.written) fail("uninitialised " + place(*region, offset) + ": " + who(access, false));
    conflict(byte.write, true);
    if (writes) {
      conflict(byte.reads[0], false);
      conflict(byte.reads[1], false);
      byte.write = access;
      byte.written = true;
    } else {
      remember_read(byte, access);
    }
  }
}

}  // namespace

void add_region(const void* start, size_t bytes, const char* name, bool shared, bool initialised) {
  Region region{static_cast<const char*>(start), bytes, name, shared, nullptr};
  clear(region, initialised);
  regions().push_back(std::move(region));
}

void remove_region(const void* start) {
  std::erase_if(regions(), [&](const Region& region) { return region.start == start; });
}

void begin_launch() {
  inside = true;
  ++launch_number;
}

void begin_block(uint32_t index, unsigned threads) {
  block = index;
  epoch = 0;
  lanes.assign(threads, Lane{});
  for (Region& region : regions()) {
    if (region.shared) clear(region, false);
  }
}

void end_launch() { inside = false; }

void set_thread(unsigned index) { thread = index; }

void block_barrier() { ++epoch; }

void warp_barrier(uint32_t mask) {
  Lane* warp = &lanes[thread / kWarp * kWarp];
  uint32_t known[kWarp] = {};
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    for (unsigned j = 0; j < kWarp; ++j) known[j] = std::max(known[j], warp[i].seen[j]);
    known[i] = std::max(known[i], warp[i].clock);
  }
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((mask >> i & 1) == 0) continue;
    std::memcpy(warp[i].seen, known, sizeof(known));
    ++warp[i].clock;
  }
}

void atomic(const void* address, size_t bytes, const void* pc) { check(address, bytes, true, true, true, pc); }

void read(const void* address, size_t bytes, const void* pc) { check(address, bytes, true, false, false, pc); }

void write(const void* address, size_t bytes, const void* pc) { check(address, bytes, false, true, false, pc); }

void poison(const void* address, size_t bytes, const void* pc) {
  write(address, bytes, pc);
  const char* first = static_cast<const char*>(address);
  Region* region = find(first);
  for (size_t i = 0; region != nullptr && i < bytes; ++i) {
    const size_t offset = static_cast<size_t>(first - region->start) + i;
    if (offset < region->bytes) region->shadow[offset].written = false;
  }
}

}  // namespace rqk::emulation::race

// --- what kernel files compiled with -fsanitize=thread call ----------------------------------------------

#define RQK_TSAN(name, bytes, writes)                                                                   \
  extern "C" void __tsan_##name(void* address) {                                                        \
    rqk::emulation::race::check(address, bytes, !(writes), writes, false, __builtin_return_address(0)); \
  }
RQK_TSAN(read1, 1, false)
RQK_TSAN(write1, 1, true)
RQK_TSAN(read2, 2, false)
RQK_TSAN(write2, 2, true)
RQK_TSAN(read4, 4, false)
RQK_TSAN(write4, 4, true)
RQK_TSAN(read8, 8, false)
RQK_TSAN(write8, 8, true)
RQK_TSAN(read16, 16, false)
RQK_TSAN(write16, 16, true)
RQK_TSAN(unaligned_read2, 2, false)
RQK_TSAN(unaligned_write2, 2, true)
RQK_TSAN(unaligned_read4, 4, false)
RQK_TSAN(unaligned_write4, 4, true)
RQK_TSAN(unaligned_read8, 8, false)
RQK_TSAN(unaligned_write8, 8, true)
RQK_TSAN(unaligned_read16, 16, false)
RQK_TSAN(unaligned_write16, 16, true)
#undef RQK_TSAN
extern "C" void __tsan_read_range(void* address, size_t bytes) {
  rqk::emulation::race::check(address, bytes, true, false, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, size_t bytes) {
  rqk::emulation::race::check(address, bytes, false, true, false, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
