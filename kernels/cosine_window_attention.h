// Geometry of shifted windows, shared by every native implementation of cosine window attention. No PyTorch in here.
//
// A map is padded at the end of each axis to a multiple of the window, rolled by -shift, and cut into windows. Nothing is
// moved: a token of a window is found on the map by its index. All maps have three axes; a plane is a volume of depth 1.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define COSINE_WINDOW_ATTENTION_HD __host__ __device__ inline
#else
#define COSINE_WINDOW_ATTENTION_HD inline
#endif

namespace cosine_window_attention {

constexpr int AXES = 3;
constexpr int MAX_WINDOW = 64;  // tokens per axis
constexpr int MAX_WIDTH = 128;  // of a head, a multiple of 8
constexpr double MAX_LOGIT_SCALE = 4.605170249938965;  // log 100 rounded to float32
constexpr double MIN_LENGTH = 1e-12;                   // of q and k; a length of exactly 0 counts as 1

// A position on the map, a window's number per axis, or a token's place in its window.
struct Place {
  int at[AXES];
};

struct Problem {
  int64_t batch;
  int grid[AXES];    // tokens of the map per axis, outermost first
  int window[AXES];  // tokens of a window per axis
  int shift[AXES];   // 0 … window - 1
  int heads;
  int width;         // of a head
  float mask_value;  // added between tokens of one window that are not neighbours on the map; may be -inf

  // -- sizes -----------------------------------------------------------------------------------------------------------

  COSINE_WINDOW_ATTENTION_HD int windows_along(int axis) const { return (grid[axis] + window[axis] - 1) / window[axis]; }
  COSINE_WINDOW_ATTENTION_HD int padded(int axis) const { return windows_along(axis) * window[axis]; }

  // Windows of one image.
  COSINE_WINDOW_ATTENTION_HD int64_t windows() const {
    return int64_t(windows_along(0)) * windows_along(1) * windows_along(2);
  }
  // Tokens of one window, absent ones included.
  COSINE_WINDOW_ATTENTION_HD int tokens() const { return window[0] * window[1] * window[2]; }
  // Tokens of one image.
  COSINE_WINDOW_ATTENTION_HD int64_t map_tokens() const { return int64_t(grid[0]) * grid[1] * grid[2]; }
  // Entries of one head's bias table: one per offset query - key.
  COSINE_WINDOW_ATTENTION_HD int offsets() const {
    return (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1);
  }

  // -- windows and tokens ----------------------------------------------------------------------------------------------

  COSINE_WINDOW_ATTENTION_HD Place window_place(int64_t number) const {
    const int columns = windows_along(2), rows = windows_along(1);
    return {{int(number / (int64_t(columns) * rows)), int(number / columns % rows), int(number % columns)}};
  }
  COSINE_WINDOW_ATTENTION_HD Place token_place(int token) const {
    return {{token / (window[1] * window[2]), token / window[2] % window[1], token % window[2]}};
  }

  // Position on the padded map, along one axis, of a token of a window.
  COSINE_WINDOW_ATTENTION_HD int position(int axis, int window_number, int token_number) const {
    const int rolled = window_number * window[axis] + token_number + shift[axis];
    return rolled < padded(axis) ? rolled : rolled - padded(axis);
  }

  // Index of a token among all tokens (B, *grid), or -1 for one outside the grid, which does not exist.
  COSINE_WINDOW_ATTENTION_HD int64_t token_index(int64_t image, const Place& win, const Place& token) const {
    int64_t index = image;
    for (int axis = 0; axis < AXES; ++axis) {
      const int p = position(axis, win.at[axis], token.at[axis]);
      if (p >= grid[axis]) return -1;
      index = index * grid[axis] + p;
    }
    return index;
  }

  // -- the mask --------------------------------------------------------------------------------------------------------

  // True where a window joins opposite borders of the map, so that some of its tokens are no neighbours: only the last
  // window of a shifted axis does. In all other windows every token has the same region.
  COSINE_WINDOW_ATTENTION_HD bool crosses_regions(const Place& win) const {
    bool crosses = false;
    for (int axis = 0; axis < AXES; ++axis) crosses |= shift[axis] > 0 && win.at[axis] == windows_along(axis) - 1;
    return crosses;
  }
  // True where some token of the window lies outside the grid.
  COSINE_WINDOW_ATTENTION_HD bool has_absent(const Place& win) const {
    bool absent = false;
    for (int axis = 0; axis < AXES; ++axis) {
      const int first = win.at[axis] * window[axis] + shift[axis];  // positions first … first + window - 1, rolled
      absent |= first < padded(axis) && first + window[axis] > grid[axis];
    }
    return absent;
  }
  // Region of a token within its window: mask_value is added between tokens of different regions.
  COSINE_WINDOW_ATTENTION_HD int region(const Place& win, const Place& token) const {
    int number = 0;
    for (int axis = 0; axis < AXES; ++axis) {
      const bool last = shift[axis] > 0 && win.at[axis] == windows_along(axis) - 1;
      number = number * 2 + (last && token.at[axis] >= window[axis] - shift[axis]);
    }
    return number;
  }

  // -- the bias --------------------------------------------------------------------------------------------------------

  // Entry of the bias table (2·w - 1 per axis) for a query and a key; entry w - 1 of an axis is offset zero.
  COSINE_WINDOW_ATTENTION_HD int offset_index(const Place& query, const Place& key) const {
    int index = 0;
    for (int axis = 0; axis < AXES; ++axis) {
      index = index * (2 * window[axis] - 1) + query.at[axis] - key.at[axis] + window[axis] - 1;
    }
    return index;
  }

  // -- tensors, all contiguous -----------------------------------------------------------------------------------------

  // First element of q (part 0), k (1) or v (2) of a token and head in qkv (B, *grid, 3, H, D).
  COSINE_WINDOW_ATTENTION_HD int64_t qkv_offset(int64_t token, int part, int head) const {
    return ((token * 3 + part) * heads + head) * width;
  }
  // The same in out (B, *grid, H·D), and in the log-sum-exp (B, *grid, H).
  COSINE_WINDOW_ATTENTION_HD int64_t out_offset(int64_t token, int head) const { return (token * heads + head) * width; }
  COSINE_WINDOW_ATTENTION_HD int64_t row_offset(int64_t token, int head) const { return token * heads + head; }
};

}  // namespace cosine_window_attention
