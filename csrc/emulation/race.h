// Calls from the runtime to the race checker; empty in builds without one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rqk::emulation::race {

#ifdef RQK_EMULATION_RACE

// Registers memory to watch. Shared memory starts uninitialized in every block.
void add_region(const void* start, size_t bytes, const char* name, bool shared, bool initialised);
void remove_region(const void* start);

void begin_launch();
void begin_block(uint32_t block, unsigned threads);
void end_launch();
// Sets the running thread, an index into its block.
void set_thread(unsigned thread);
// All threads of the block, or these lanes of the running thread's warp, have met: their earlier accesses are visible.
void block_barrier();
void warp_barrier(uint32_t mask);

void atomic(const void* address, size_t bytes, const void* pc);
void read(const void* address, size_t bytes, const void* pc);
void write(const void* address, size_t bytes, const void* pc);
// Marks the bytes uninitialized: reading them before the next write is an error.
void poison(const void* address, size_t bytes, const void* pc);

#else

inline void add_region(const void*, size_t, const char*, bool, bool) {}
inline void remove_region(const void*) {}
inline void begin_launch() {}
inline void begin_block(uint32_t, unsigned) {}
inline void end_launch() {}
inline void set_thread(unsigned) {}
inline void block_barrier() {}
inline void warp_barrier(uint32_t) {}
inline void atomic(const void*, size_t, const void*) {}
inline void read(const void*, size_t, const void*) {}
inline void write(const void*, size_t, const void*) {}
inline void poison(const void*, size_t, const void*) {}

#endif

}  // namespace rqk::emulation::race
