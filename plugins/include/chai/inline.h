// CHAI_INLINE: for functions in headers that are compiled for several instruction sets in one library, where
// the linker must never pick the copy of the widest one for everybody.
#pragma once

#define CHAI_INLINE inline __attribute__((always_inline))
