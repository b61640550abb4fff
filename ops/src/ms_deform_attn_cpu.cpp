// Multi-scale deformable attention on the CPU, forward and backward, in float and double.
//
// Both directions work on one head of one image at a time. The head's levels are first copied
// next to each other into a private buffer, every level with a border of zero pixels and every
// pixel padded to whole vectors. That copy costs a tenth of the work and pays three times:
//   - a head of a usual pyramid then fits the second-level cache, where its pixels would
//     otherwise lie M * D apart and share a few cache sets;
//   - a sampling location clamped to the border reads zeros: no branch for what lies outside;
//   - the inner loops run over whole vectors, whatever D is.
// Locations are turned into pixel offsets and corner weights for a block of queries at a time, in
// plain loops over arrays that the compiler vectorises.
//
// Nothing is shared between threads: the forward pass splits the queries, the backward pass the
// heads (and the levels, when there are more threads than heads). Every sum is formed in one fixed
// order, so results are the same from run to run and for any number of threads.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define INLINE __attribute__((always_inline)) inline
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, typename V::Mask{__VA_ARGS__})
#endif
#define API extern "C" __attribute__((visibility("default")))

namespace {

// Sampling points handled together: their offsets and weights stay in the first-level cache.
constexpr int64_t kBlockPoints = 512;
// Queries by which the rows of grad_output are fetched ahead.
constexpr int64_t kAhead = 8;
// Alignment of buffers, and the bytes of the widest vector.
constexpr int64_t kLine = 64;

// The vectors of an instruction set whose registers have kBytes: whole registers, since compilers
// pass wider vectors through memory, and at least four lanes.
template <class Element, int64_t kBytes>
struct Simd {
  using A = Element;
  static constexpr int64_t kLanes = std::max<int64_t>(kBytes / sizeof(A), 4);
  typedef A Vector __attribute__((vector_size(kLanes * sizeof(A)), aligned(sizeof(A)), may_alias));
  typedef A Four __attribute__((vector_size(4 * sizeof(A)), aligned(sizeof(A)), may_alias));
  typedef decltype(Four{} < Four{}) Mask;
};

template <class V>
INLINE const typename V::Vector& load(const typename V::A* p) {
  return *reinterpret_cast<const typename V::Vector*>(p);
}
template <class V>
INLINE void store(typename V::A* p, const typename V::Vector& v) {
  *reinterpret_cast<typename V::Vector*>(p) = v;
}

// Fetches n elements ahead of their use. The tensors' rows of one head are M rows apart, too far
// for the processor to do so by itself. No harm is done past the end of a tensor.
template <class A>
INLINE void fetch(const A* p, int64_t n) {
  for (int64_t i = 0; i < n; i += kLine / sizeof(A)) __builtin_prefetch(p + i);
}

template <class A>
struct Problem {
  const A* value;                    // (B, S, M, D)
  const int64_t* spatial_shapes;     // (L, 2) as (height, width)
  const int64_t* level_start_index;  // (L,)
  const A* locations;                // (B, Q, M, L, P, 2) as (x, y)
  const A* weights;                  // (B, Q, M, L, P)
  int64_t B, S, M, D, Q, L, P;
  int64_t D_padded;  // D rounded up to whole chunks of vectors

  INLINE int64_t height(int64_t l) const { return spatial_shapes[2 * l]; }
  INLINE int64_t width(int64_t l) const { return spatial_shapes[2 * l + 1]; }
  // Pixels of levels [first, last), their zero borders included.
  INLINE int64_t bordered_pixels(int64_t first, int64_t last) const {
    int64_t n = 0;
    for (int64_t l = first; l < last; ++l) n += (height(l) + 2) * (width(l) + 2);
    return n;
  }
};

// How much of everything one thread holds at a time.
struct Extent {
  int64_t head_elements;  // of the bordered, padded levels of one head
  int64_t per_query;      // points of one query
  int64_t block;          // queries
  int64_t D_padded;
  bool backward;
};

// The buffers of one thread, cut from one piece of memory.
template <class A>
struct Workspace {
  A *head, *grad_head;      // bordered levels of one head, and their gradient
  A *width, *height;        // for each point of a block: the size of its level,
  int32_t *row, *level;     //   elements in a bordered row, offset of the level in `head`
  A *x, *y, *a;             // location and attention weight; then their gradients
  int32_t* offset;          // of the upper left pixel in `head`
  A* corner[4];             // attention weight times bilinear weight: 00, 01, 10, 11 as (y, x)
  A *fx, *fy, *inside;      // fractions; the attention weight where the location is inside, else 0
  A* dots;                  // for each point, the four products of a pixel and grad_output
  A* rows;                  // of grad_output for a block, or of the output, padded
  int64_t bytes = 0;

  Workspace(char* memory, const Extent& e) {
    auto take = [&](auto*& pointer, int64_t n) {
      using Element = std::remove_reference_t<decltype(*pointer)>;
      pointer = reinterpret_cast<Element*>(memory + bytes);
      bytes += (n * sizeof(Element) + kLine - 1) / kLine * kLine;
    };
    const int64_t points = e.block * e.per_query;
    take(head, e.head_elements);
    for (A** p : {&width, &height, &x, &y, &a}) take(*p, points);
    for (int32_t** p : {&row, &level, &offset}) take(*p, points);
    for (A*& p : corner) take(p, points);
    take(rows, e.block * e.D_padded);
    if (!e.backward) return;
    take(grad_head, e.head_elements);
    for (A** p : {&fx, &fy, &inside}) take(*p, points);
    take(dots, 4 * points);
  }
};

// Queries [begin, end) of head `m` of image `b`, levels [first, last).
struct Block {
  int64_t b, m, first, last, begin, end;
};

// Copies head m of image b, levels [first, last), with borders and padding of zeros.
template <class V, class A>
INLINE void pack_head(const Problem<A> p, const Block at, A* out) {
  const int64_t pixel = p.D_padded;
  for (int64_t l = at.first; l < at.last; ++l) {
    const int64_t H = p.height(l), W = p.width(l);
    const A* in = p.value + ((at.b * p.S + p.level_start_index[l]) * p.M + at.m) * p.D;
    std::memset(out, 0, (W + 2) * pixel * sizeof(A));
    out += (W + 2) * pixel;
    for (int64_t y = 0; y < H; ++y) {
      std::memset(out, 0, pixel * sizeof(A));
      out += pixel;
      for (int64_t x = 0; x < W; ++x, in += p.M * p.D, out += pixel) {
        fetch(in + kAhead * p.M * p.D, p.D);
        if (p.D == pixel) {
          for (int64_t d = 0; d < pixel; d += V::kLanes) store<V>(out + d, load<V>(in + d));
        } else {
          for (int64_t d = 0; d < p.D; ++d) out[d] = in[d];
          for (int64_t d = p.D; d < pixel; ++d) out[d] = 0;
        }
      }
      std::memset(out, 0, pixel * sizeof(A));
      out += pixel;
    }
    std::memset(out, 0, (W + 2) * pixel * sizeof(A));
    out += (W + 2) * pixel;
  }
}

// The reverse of pack_head for the gradient: borders and padding are dropped.
template <class V, class A>
INLINE void unpack_grad(const Problem<A> p, const Block at, const A* in, A* grad_value) {
  const int64_t pixel = p.D_padded;
  for (int64_t l = at.first; l < at.last; ++l) {
    const int64_t H = p.height(l), W = p.width(l);
    A* out = grad_value + ((at.b * p.S + p.level_start_index[l]) * p.M + at.m) * p.D;
    in += (W + 3) * pixel;
    for (int64_t y = 0; y < H; ++y, in += 2 * pixel) {
      for (int64_t x = 0; x < W; ++x, in += pixel, out += p.M * p.D) {
        fetch(out + kAhead * p.M * p.D, p.D);
        if (p.D == pixel) {
          for (int64_t d = 0; d < pixel; d += V::kLanes) store<V>(out + d, load<V>(in + d));
        } else {
          for (int64_t d = 0; d < p.D; ++d) out[d] = in[d];
        }
      }
    }
    in += (W + 1) * pixel;
  }
}

// The level of every point of a block, the same for each query.
template <class A>
INLINE void set_levels(const Problem<A> p, int64_t first, int64_t last, int64_t points,
                       const Workspace<A> w) {
  int64_t i = 0;
  while (i < points) {
    int64_t start = 0;
    for (int64_t l = first; l < last; ++l) {
      for (int64_t k = 0; k < p.P; ++k, ++i) {
        w.width[i] = static_cast<A>(p.width(l));
        w.height[i] = static_cast<A>(p.height(l));
        w.row[i] = static_cast<int32_t>((p.width(l) + 2) * p.D_padded);
        w.level[i] = static_cast<int32_t>(start);
      }
      start += (p.height(l) + 2) * (p.width(l) + 2) * p.D_padded;
    }
  }
}

// Locations and attention weights of the block -> offsets, corner weights, fractions.
template <class A, bool backward>
INLINE void locate(const Problem<A> p, const Block at, const Workspace<A> w) {
  const int64_t per_query = (at.last - at.first) * p.P;
  const int64_t points = (at.end - at.begin) * per_query;
  A *x = w.x, *y = w.y, *a = w.a;
  for (int64_t q = at.begin; q < at.end; ++q) {
    const int64_t from = (((at.b * p.Q + q) * p.M + at.m) * p.L + at.first) * p.P;
    const A *location = p.locations + 2 * from, *weight = p.weights + from;
    fetch(location + 2 * kAhead * p.M * p.L * p.P, 2 * per_query);
    fetch(weight + kAhead * p.M * p.L * p.P, per_query);
#pragma omp simd
    for (int64_t i = 0; i < per_query; ++i) {
      x[i] = location[2 * i];
      y[i] = location[2 * i + 1];
    }
    for (int64_t i = 0; i < per_query; ++i) a[i] = weight[i];
    x += per_query, y += per_query, a += per_query;
  }
  x = w.x, y = w.y, a = w.a;
  const A *width = w.width, *height = w.height;
  const int32_t *row = w.row, *level = w.level;
  int32_t* offset = w.offset;
  A *w00 = w.corner[0], *w01 = w.corner[1], *w10 = w.corner[2],
               *w11 = w.corner[3];
  const int32_t pixel = static_cast<int32_t>(p.D_padded);
#pragma omp simd
  for (int64_t i = 0; i < points; ++i) {
    // Column 0 of the bordered level is pixel -1, hence + 0.5 where the definition has - 0.5.
    // The comparisons send NaN to 0, into the border.
    const A u = x[i] * width[i] + A(0.5), v = y[i] * height[i] + A(0.5);
    A cu = u > A(0) ? u : A(0), cv = v > A(0) ? v : A(0);
    cu = cu < width[i] + 1 ? cu : width[i] + 1;
    cv = cv < height[i] + 1 ? cv : height[i] + 1;
    const int32_t column = static_cast<int32_t>(cu < width[i] ? cu : width[i]);
    const int32_t line = static_cast<int32_t>(cv < height[i] ? cv : height[i]);
    const A fx = cu - static_cast<A>(column), fy = cv - static_cast<A>(line);
    offset[i] = level[i] + line * row[i] + column * pixel;
    const A upper = (1 - fy) * a[i], lower = fy * a[i];
    w00[i] = (1 - fx) * upper;
    w01[i] = fx * upper;
    w10[i] = (1 - fx) * lower;
    w11[i] = fx * lower;
    if (backward) {
      w.fx[i] = fx;
      w.fy[i] = fy;
      w.inside[i] = (u > 0) & (u < width[i] + 1) & (v > 0) & (v < height[i] + 1) ? a[i] : A(0);
    }
  }
}

// out[q] = sum over the points of corner weight * pixel, N vectors of channels at a time.
template <class V, int N, class A>
INLINE void gather(const Problem<A> p, const Block at, const Workspace<A> w, A* output) {
  const int64_t per_query = (at.last - at.first) * p.P;
  const int64_t pixel = p.D_padded;
  for (int64_t q = at.begin; q < at.end; ++q) {
    A* out = output + ((at.b * p.Q + q) * p.M + at.m) * p.D;
    A* sums = p.D == pixel ? out : w.rows;
    fetch(out + kAhead * p.M * p.D, p.D);
    const int64_t from = (q - at.begin) * per_query;
    for (int64_t d = 0; d < pixel; d += N * V::kLanes) {
      typename V::Vector left[N] = {}, right[N] = {};  // two chains of additions, for the pipeline
      for (int64_t i = from; i < from + per_query; ++i) {
        const A* above = w.head + w.offset[i] + d;
        const A* below = above + w.row[i];
        for (int k = 0; k < N; ++k) {
          const int64_t c = k * V::kLanes;
          left[k] += load<V>(above + c) * w.corner[0][i];
          right[k] += load<V>(above + pixel + c) * w.corner[1][i];
          left[k] += load<V>(below + c) * w.corner[2][i];
          right[k] += load<V>(below + pixel + c) * w.corner[3][i];
        }
      }
      for (int k = 0; k < N; ++k) store<V>(sums + d + k * V::kLanes, left[k] + right[k]);
    }
    if (sums != out) std::memcpy(out, sums, p.D * sizeof(A));
  }
}

// sums[c] = the sum of the lanes of vectors[c].
template <class V>
INLINE void sum_lanes(const typename V::Vector (&vectors)[4], typename V::Four& sums) {
  using Four = typename V::Four;
  auto add_pairs = [](const Four& a, const Four& b, Four& out) {
    out = SHUFFLE(a, b, 0, 2, 4, 6) + SHUFFLE(a, b, 1, 3, 5, 7);
  };
  Four folded[4], halves[2];
  for (int c = 0; c < 4; ++c) {
    const Four* lanes = reinterpret_cast<const Four*>(&vectors[c]);
    folded[c] = lanes[0];
    if (V::kLanes > 4) folded[c] += lanes[1];
    if (V::kLanes > 8) folded[c] += lanes[2] + lanes[3];
  }
  add_pairs(folded[0], folded[1], halves[0]);
  add_pairs(folded[2], folded[3], halves[1]);
  add_pairs(halves[0], halves[1], sums);
}

// Adds corner weight * grad_output to the four pixels of every point, and leaves in `dots` the
// four products pixel . grad_output, from which the other gradients follow. Level by level, since
// neighbouring queries often sample the same pixels, which then stay in the first-level cache.
template <class V, int N, class A>
INLINE void scatter(const Problem<A> p, const Block at, const Workspace<A> w, const A* grad_output) {
  using Four = typename V::Four;
  const int64_t per_query = (at.last - at.first) * p.P;
  const int64_t queries = at.end - at.begin, pixel = p.D_padded;
  for (int64_t q = 0; q < queries; ++q) {
    const A* grad = grad_output + ((at.b * p.Q + at.begin + q) * p.M + at.m) * p.D;
    fetch(grad + kAhead * p.M * p.D, p.D);
    A* row = w.rows + q * pixel;
    std::memcpy(row, grad, p.D * sizeof(A));
    std::memset(row + p.D, 0, (pixel - p.D) * sizeof(A));
  }
  for (int64_t level = 0; level < per_query; level += p.P) {
    const int64_t corners[4] = {0, pixel, w.row[level], w.row[level] + pixel};
    for (int64_t q = 0; q < queries; ++q) {
      const int64_t from = q * per_query + level;
      for (int64_t d = 0; d < pixel; d += N * V::kLanes) {
        typename V::Vector g[N];
        for (int k = 0; k < N; ++k) g[k] = load<V>(w.rows + q * pixel + d + k * V::kLanes);
        for (int64_t i = from; i < from + p.P; ++i) {
          const A* source = w.head + w.offset[i] + d;
          A* target = w.grad_head + w.offset[i] + d;
          typename V::Vector products[4] = {};
          for (int c = 0; c < 4; ++c) {
            const A weight = w.corner[c][i];
            for (int k = 0; k < N; ++k) {
              const int64_t to = corners[c] + k * V::kLanes;
              products[c] += load<V>(source + to) * g[k];
              store<V>(target + to, load<V>(target + to) + g[k] * weight);
            }
          }
          Four sums;
          sum_lanes<V>(products, sums);
          Four& dots = reinterpret_cast<Four*>(w.dots)[i];
          dots = d == 0 ? sums : dots + sums;
        }
      }
    }
  }
}

// dots -> gradients of the locations and the attention weights of the block.
template <class A>
INLINE void store_grads(const Problem<A> p, const Block at, const Workspace<A> w, A* grad_locations,
                        A* grad_weights) {
  const int64_t per_query = (at.last - at.first) * p.P;
  const int64_t points = (at.end - at.begin) * per_query;
  A *x = w.x, *y = w.y, *a = w.a;
  const A *dots = w.dots, *fx = w.fx, *fy = w.fy,
          *inside = w.inside, *width = w.width, *height = w.height;
#pragma omp simd
  for (int64_t i = 0; i < points; ++i) {
    const A d00 = dots[4 * i], d01 = dots[4 * i + 1], d10 = dots[4 * i + 2], d11 = dots[4 * i + 3];
    const A above = d00 + (d01 - d00) * fx[i], below = d10 + (d11 - d10) * fx[i];
    a[i] = above + (below - above) * fy[i];
    x[i] = ((d01 - d00) * (1 - fy[i]) + (d11 - d10) * fy[i]) * width[i] * inside[i];
    y[i] = (below - above) * height[i] * inside[i];
  }
  for (int64_t q = at.begin; q < at.end; ++q) {
    const int64_t to = (((at.b * p.Q + q) * p.M + at.m) * p.L + at.first) * p.P;
    A *location = grad_locations + 2 * to, *weight = grad_weights + to;
    fetch(location + 2 * kAhead * p.M * p.L * p.P, 2 * per_query);
    fetch(weight + kAhead * p.M * p.L * p.P, per_query);
#pragma omp simd
    for (int64_t i = 0; i < per_query; ++i) {
      location[2 * i] = x[i];
      location[2 * i + 1] = y[i];
    }
    for (int64_t i = 0; i < per_query; ++i) weight[i] = a[i];
    x += per_query, y += per_query, a += per_query;
  }
}

template <class A>
struct Grads {
  const A* grad_output;                          // (B, Q, M * D)
  A *grad_value, *grad_locations, *grad_weights;  // as the inputs
};

// Forward of work items [begin, end) of the B * M * Q (image, head, query) triples.
template <class V, int N, class A>
INLINE void forward_items(const Problem<A>& p, A* output, int64_t begin, int64_t end,
                          int64_t block, Workspace<A>& w) {
  set_levels(p, 0, p.L, block * p.L * p.P, w);
  while (begin < end) {
    const int64_t head = begin / p.Q, last = std::min(end, (head + 1) * p.Q) - head * p.Q;
    Block at{head / p.M, head % p.M, 0, p.L, 0, 0};
    pack_head<V>(p, at, w.head);
    for (int64_t q = begin % p.Q; q < last; q += block) {
      at.begin = q, at.end = std::min(q + block, last);
      locate<A, false>(p, at, w);
      gather<V, N>(p, at, w, output);
    }
    begin = head * p.Q + last;
  }
}

// Backward of work items [begin, end) of the B * M * parts (image, head, part of the levels).
template <class V, int N, class A>
INLINE void backward_items(const Problem<A>& p, const Grads<A>& g, int64_t begin, int64_t end,
                           int64_t parts, int64_t block, Workspace<A>& w) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / parts, part = item % parts;
    Block at{head / p.M, head % p.M, p.L * part / parts, p.L * (part + 1) / parts, 0, 0};
    set_levels(p, at.first, at.last, block * (at.last - at.first) * p.P, w);
    pack_head<V>(p, at, w.head);
    std::memset(w.grad_head, 0, p.bordered_pixels(at.first, at.last) * p.D_padded * sizeof(A));
    for (int64_t q = 0; q < p.Q; q += block) {
      at.begin = q, at.end = std::min(q + block, p.Q);
      locate<A, true>(p, at, w);
      scatter<V, N>(p, at, w, g.grad_output);
      store_grads(p, at, w, g.grad_locations, g.grad_weights);
    }
    unpack_grad<V>(p, at, w.grad_head, g.grad_value);
  }
}

// The same source for each instruction set; everything above is inlined into these.
#define DEFINE_ITEMS(SUFFIX, BYTES, TARGET)                                                        \
  template <class A, int N>                                                                        \
  TARGET void forward_##SUFFIX(const Problem<A>& p, A* output, int64_t begin, int64_t end,         \
                               int64_t block, Workspace<A>& w) {                                   \
    forward_items<Simd<A, BYTES>, N>(p, output, begin, end, block, w);                             \
  }                                                                                                \
  template <class A, int N>                                                                        \
  TARGET void backward_##SUFFIX(const Problem<A>& p, const Grads<A>& g, int64_t begin,             \
                                int64_t end, int64_t parts, int64_t block, Workspace<A>& w) {      \
    backward_items<Simd<A, BYTES>, N>(p, g, begin, end, parts, block, w);                          \
  }                                                                                                \
  template <class A, int N>                                                                        \
  constexpr Kernel<A> kernel_##SUFFIX = {N * Simd<A, BYTES>::kLanes, forward_##SUFFIX<A, N>,       \
                                         backward_##SUFFIX<A, N>};

// `step`: the channels of one pass over the points; pixels are padded to a multiple of it.
template <class A>
struct Kernel {
  int64_t step;
  void (*forward)(const Problem<A>&, A*, int64_t, int64_t, int64_t, Workspace<A>&);
  void (*backward)(const Problem<A>&, const Grads<A>&, int64_t, int64_t, int64_t, int64_t,
                   Workspace<A>&);
};

DEFINE_ITEMS(narrow, 16, )
#if defined(__x86_64__)
DEFINE_ITEMS(avx2, 32, __attribute__((target("avx2,fma"))))
DEFINE_ITEMS(avx512, 64, __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))))
#endif

// Slowest first. The narrow one is for what the compiler assumes of every processor: SSE2, NEON.
enum Variant { kNarrow, kAvx2, kAvx512 };
#if defined(__aarch64__)
constexpr const char* kNames[] = {"neon"};
#elif defined(__x86_64__)
constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
#else
constexpr const char* kNames[] = {"baseline"};
#endif
constexpr int kVariants = sizeof(kNames) / sizeof(*kNames);

bool is_supported(int variant) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (variant == kAvx2) return avx2;
  if (variant == kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return variant == kNarrow;
}

// The variant that MS_DEFORM_ATTN_CPU names, else the fastest; -1 if there is none of that name.
int chosen_variant() {
  const char* name = std::getenv("MS_DEFORM_ATTN_CPU");
  for (int variant = kVariants - 1; variant >= 0; --variant) {
    const bool is_wanted = !name || !*name || !std::strcmp(name, kNames[variant]);
    if (is_wanted && is_supported(variant)) return variant;
  }
  return -1;
}

// As many vectors at a time as the registers hold, and no more than D fills.
template <class A>
Kernel<A> choose_kernel([[maybe_unused]] int variant, int64_t D) {
#if defined(__x86_64__)
  if (variant == kAvx512) {
    return D > kernel_avx512<A, 1>.step ? kernel_avx512<A, 2> : kernel_avx512<A, 1>;
  }
  if (variant == kAvx2) {
    if (D > kernel_avx2<A, 2>.step) return kernel_avx2<A, 4>;
    return D > kernel_avx2<A, 1>.step ? kernel_avx2<A, 2> : kernel_avx2<A, 1>;
  }
#endif
  if (D > kernel_narrow<A, 2>.step) return kernel_narrow<A, 4>;
  return D > kernel_narrow<A, 1>.step ? kernel_narrow<A, 2> : kernel_narrow<A, 1>;
}

enum Status { kOk = 0, kOutOfMemory = 1, kTooLarge = 2, kUnknownVariant = 3 };

// Calls work(begin, end, workspace) on up to `threads` threads, which share [0, items) equally.
template <class A, class Work>
int parallel(int64_t items, int64_t threads, const Extent& extent, const Work& work) {
  if (extent.head_elements > INT32_MAX) return kTooLarge;
  threads = std::max<int64_t>(1, std::min(threads, items));
  const int64_t bytes = Workspace<A>(nullptr, extent).bytes;
  void* memory = nullptr;
  if (posix_memalign(&memory, 4096, threads * bytes)) return kOutOfMemory;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int64_t t = 0; t < threads; ++t) {
    Workspace<A> workspace(static_cast<char*>(memory) + t * bytes, extent);
    work(items * t / threads, items * (t + 1) / threads, workspace);
  }
  std::free(memory);
  return kOk;
}

int64_t queries_of(int64_t per_query) { return std::max<int64_t>(1, kBlockPoints / per_query); }

template <class A>
int forward(const Problem<A>& p, const Kernel<A>& kernel, A* output, int64_t threads) {
  const Extent extent{p.bordered_pixels(0, p.L) * p.D_padded, p.L * p.P, queries_of(p.L * p.P),
                      p.D_padded, false};
  return parallel<A>(p.B * p.M * p.Q, threads, extent,
                     [&](int64_t begin, int64_t end, Workspace<A>& w) {
                       kernel.forward(p, output, begin, end, extent.block, w);
                     });
}

template <class A>
int backward(const Problem<A>& p, const Kernel<A>& kernel, const Grads<A>& g, int64_t threads) {
  const int64_t parts = p.B * p.M < threads ? p.L : 1;
  const int64_t per_query = (parts == 1 ? p.L : 1) * p.P;
  int64_t pixels = 0;
  for (int64_t part = 0; part < parts; ++part) {
    pixels = std::max(pixels, p.bordered_pixels(p.L * part / parts, p.L * (part + 1) / parts));
  }
  const Extent extent{pixels * p.D_padded, per_query, queries_of(per_query), p.D_padded, true};
  return parallel<A>(p.B * p.M * parts, threads, extent,
                     [&](int64_t begin, int64_t end, Workspace<A>& w) {
                       kernel.backward(p, g, begin, end, parts, extent.block, w);
                     });
}

// Calls function(problem, kernel) for the chosen variant.
template <class A, class Function>
int with_kernel(const void* value, const int64_t* shapes, const int64_t* starts,
                const void* locations, const void* weights, int64_t B, int64_t S, int64_t M,
                int64_t D, int64_t Q, int64_t L, int64_t P, const Function& function) {
  const int variant = chosen_variant();
  if (variant < 0) return kUnknownVariant;
  const Kernel<A> kernel = choose_kernel<A>(variant, D);
  const int64_t padded = (D + kernel.step - 1) / kernel.step * kernel.step;
  const Problem<A> problem{static_cast<const A*>(value), shapes, starts,
                           static_cast<const A*>(locations), static_cast<const A*>(weights), B, S,
                           M, D, Q, L, P, padded};
  return function(problem, kernel);
}

}  // namespace

// The interface that native.py calls. Tensors are contiguous, of double or float; no size is 0;
// every level lies inside the S rows of value, and none inside another. Returns a Status.

API int ms_deform_attn_cpu_abi() { return 2; }

// Whether this processor runs the variant of that name.
API int ms_deform_attn_cpu_supports(const char* name) {
  for (int variant = 0; variant < kVariants; ++variant) {
    if (!std::strcmp(name, kNames[variant])) return is_supported(variant);
  }
  return 0;
}

API int ms_deform_attn_cpu_forward(int is_double, int64_t threads, const void* value,
                                   const int64_t* spatial_shapes, const int64_t* level_start_index,
                                   const void* locations, const void* weights, void* output,
                                   int64_t B, int64_t S, int64_t M, int64_t D, int64_t Q, int64_t L,
                                   int64_t P) {
  auto run = [&](auto zero) {
    using A = decltype(zero);
    return with_kernel<A>(value, spatial_shapes, level_start_index, locations, weights, B, S, M, D,
                          Q, L, P, [&](const Problem<A>& p, const Kernel<A>& kernel) {
                            return forward(p, kernel, static_cast<A*>(output), threads);
                          });
  };
  return is_double ? run(0.0) : run(0.0f);
}

// grad_value is written where a level is; the caller zeroes it if the levels leave rows out.
API int ms_deform_attn_cpu_backward(int is_double, int64_t threads, const void* value,
                                    const int64_t* spatial_shapes, const int64_t* level_start_index,
                                    const void* locations, const void* weights,
                                    const void* grad_output, void* grad_value, void* grad_locations,
                                    void* grad_weights, int64_t B, int64_t S, int64_t M, int64_t D,
                                    int64_t Q, int64_t L, int64_t P) {
  auto run = [&](auto zero) {
    using A = decltype(zero);
    const Grads<A> g{static_cast<const A*>(grad_output), static_cast<A*>(grad_value),
                     static_cast<A*>(grad_locations), static_cast<A*>(grad_weights)};
    return with_kernel<A>(value, spatial_shapes, level_start_index, locations, weights, B, S, M, D,
                          Q, L, P, [&](const Problem<A>& p, const Kernel<A>& kernel) {
                            return backward(p, kernel, g, threads);
                          });
  };
  return is_double ? run(0.0) : run(0.0f);
}
