// The processor's tile registers (AMX): eight, each of up to 16 rows of 64 bytes, and products of whole tiles.
//
// The compiler does not know these registers, so the instructions are written out. A thread gives the registers their
// shapes before it uses them and releases them after, so that the system has nothing to save when it puts another
// thread in its place. Format and instructions: Intel 64 Software Developer's Manual, volume 1, chapter 18.
#pragma once

#include "number.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILE_REGISTERS 1

#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

constexpr int TILE_ROWS = 16;
constexpr int TILE_BYTES = 64;  // in a row
constexpr Index TILE_DEPTH = 32;  // bfloat16 numbers in a row

struct alignas(64) TileShapes {
    uint8_t palette = 1;
    uint8_t reserved[15] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, Index num_rows, Index bytes = TILE_BYTES) {
        row_bytes[tile] = static_cast<uint16_t>(bytes);
        rows[tile] = static_cast<uint8_t>(num_rows);
    }
};

// Asks the system once for leave to use the registers, which it gives to the whole process.
static inline bool may_use_tiles() {
    constexpr long REQUEST_STATE = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_STATE, TILE_DATA) == 0;
    return granted;
}

// True if they multiply inputs so wide: products, rank rows and how these lie all ask here.
static inline bool tiles_take(Index d_in) { return d_in % TILE_DEPTH == 0 && may_use_tiles(); }

// Shapes for each number of rows from 1 to `most`, made once: the processor waits for shapes that were just written.
template <typename Make>
static std::vector<TileShapes> shapes_by_rows(int most, const Make& make) {
    std::vector<TileShapes> all(most + 1);
    for (int num_rows = 1; num_rows <= most; ++num_rows) make(all[num_rows], num_rows);
    return all;
}

static inline void shape_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }

static inline void release_tiles() { asm volatile("tilerelease"); }

// Sums 0 to 3 and what is multiplied, 4, of so many rows; 5 whole, for what it is multiplied with; 6 and 7 for half as
// deep a product as 4 and 5.
static inline void shape_for_block(Index num_rows) {
    static const auto shapes = shapes_by_rows(TILE_ROWS, [](TileShapes& some, int rows) {
        for (int tile : {0, 1, 2, 3, 4}) some.set(tile, rows);
        some.set(5, TILE_ROWS);
        some.set(6, rows, TILE_BYTES / 2);
        some.set(7, TILE_ROWS / 2);
    });
    shape_tiles(shapes[num_rows]);
}

template <int TILE>
static inline void clear_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}

template <int TILE>
static inline void load_tile(const void* rows, Index stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride_bytes), "i"(TILE) : "memory");
}

// A tile that need not stay in the nearest cache.
template <int TILE>
static inline void load_tile_once(const void* rows, Index stride_bytes) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride_bytes), "i"(TILE) : "memory");
}

template <int TILE>
static inline void store_tile(void* rows, Index stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride_bytes), "i"(TILE) : "memory");
}

// SUMS [m][16] += A [m][16][2] B [16][16][2], pairs of bfloat16 to a float32.
template <int SUMS, int A, int B>
static inline void add_pair_products() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(A), "i"(B));
}

#endif
