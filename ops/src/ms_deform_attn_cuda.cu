// Multi-scale deformable attention on CUDA, forward and backward, behind a plain C interface (it is
// loaded at run time, and needs neither Python nor torch headers to build).
//
//   out[b, q, m] = sum over levels l and points p of weights[b, q, m, l, p] *
//                  bilinear(level l of value[b, :, m], locations[b, q, m, l, p])
//
// Mapping. A team of up to 8 lanes owns one (image, query, head). Each lane holds some neighbouring
// channels, so that a corner of a sample is one vector load per lane, contiguous over the team.
// Where a sample falls is worked out once, not once per lane: the team takes its samples in rounds,
// one sample per lane, and hands the corners (pixels and weights) around through shared memory.
// A block takes consecutive queries of one head. Queries that are neighbours in the image sample
// overlapping pixels, so most corners are found in L1; the heads of the same queries are the next
// blocks, so that what runs at one time touches one contiguous window of every tensor.
//
// What bounds it. Forward: the L1 bandwidth of the corner loads, hence no conversion of half types
// to float in memory, and little else in the inner loop. Backward: the atomic additions to
// grad_value in L2, hence 16-byte additions where the device has them (compute capability 9.0), and
// elsewhere lanes laid out so that a scalar addition of the team fills a whole 32-byte sector. The
// gradients of locations and weights are sums over channels: one butterfly per round delivers to
// each lane the sums of its own sample.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 256;
constexpr unsigned kWarp = 0xffffffffu;

// 16-byte atomic additions came with compute capability 9.0 and CUDA 12.1.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
constexpr bool kVectorAtomics = true;
#else
constexpr bool kVectorAtomics = false;
#endif

struct Sizes {
  int64_t images, pixels, heads, channels, queries, levels, points;
};

// The type of every computation: double for double, float for all others.
template <typename T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Lanes per team, given the channels of a head (0: not known at compile time) and of a lane. More
// than 8 would cost the backward too many registers; wider heads go over their channels in steps.
constexpr int team_size(int channels, int per_lane) {
  return channels && channels / per_lane < 8 ? channels / per_lane : 8;
}

// Forward: 16 bytes of value per lane. Backward: of grad_value, which is what counts there.
template <typename T, int kChannels>
constexpr int forward_width = kChannels ? 16 / sizeof(T) : 1;
template <typename T, int kChannels>
constexpr int forward_team = team_size(kChannels, forward_width<T, kChannels>);
template <int kChannels>
constexpr int backward_team = team_size(kChannels, 4);

template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
  T item[N];
};

template <typename T, typename F, int N>
__device__ void load(const T* from, F (&to)[N]) {
  const auto raw = *reinterpret_cast<const Vector<T, N>*>(from);
  for (int i = 0; i < N; ++i) to[i] = static_cast<F>(raw.item[i]);
}

// A bfloat16 is the upper half of a float. Taking pairs apart by hand spares an instruction per
// pair, and the forward of half types is bound by instructions as much as by loads.
template <int N>
__device__ std::enable_if_t<N % 2 == 0> load(const __nv_bfloat16* from, float (&to)[N]) {
  const auto raw = *reinterpret_cast<const Vector<unsigned, N / 2>*>(from);
  for (int i = 0; i < N; ++i)
    to[i] = __uint_as_float(i % 2 ? raw.item[i / 2] & 0xffff0000u : raw.item[i / 2] << 16);
}

template <typename T, typename F, int N>
__device__ void store(T* to, const F (&from)[N]) {
  Vector<T, N> raw;
  for (int i = 0; i < N; ++i) raw.item[i] = static_cast<T>(from[i]);
  if constexpr (sizeof(raw) == 16) {  // spelled out: compilers split up the store of a structure
    uint4 word;
    memcpy(&word, &raw, sizeof(word));
    __stcg(reinterpret_cast<uint4*>(to), word);
  } else {
    *reinterpret_cast<Vector<T, N>*>(to) = raw;
  }
}

// `base` moved on by a number of pixels. Both factors are unsigned and of 32 bits, because then the
// whole address is one multiply-add; it is computed once per 16 bytes loaded.
template <typename T>
__device__ T* pixel_at(T* base, unsigned pixel, unsigned stride) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(base) +
                              uint64_t(pixel) * (stride * unsigned(sizeof(T))));
}

template <typename F, int N>
__device__ void add_scaled(F* to, F scale, const F (&from)[N]) {
  if constexpr (kVectorAtomics && N == 4) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    atomicAdd(reinterpret_cast<float4*>(to),
              make_float4(scale * from[0], scale * from[1], scale * from[2], scale * from[3]));
#endif
  } else {
    for (int i = 0; i < N; ++i) atomicAdd(to + i, scale * from[i]);
  }
}

struct alignas(16) Level {
  int height, width, start;
  int fits;  // into `value`; one that does not is replaced by the first pixel, and never hit
};

// Writes the level of each sample of a query to shared memory, so that nobody divides by the number
// of points later. Each block checks the levels, as the host cannot see them without waiting.
__device__ void read_levels(const int64_t* shapes, const int64_t* starts, const Sizes& sizes,
                            Level* levels) {
  const int samples = sizes.levels * sizes.points;
#pragma unroll 1
  for (int s = threadIdx.x; s < samples; s += kThreads) {
    const int l = s / int(sizes.points);
    const int64_t height = shapes[2 * l], width = shapes[2 * l + 1], start = starts[l];
    // The sides are compared first: below 2^31 (checked by the host) their product cannot overflow.
    const bool fits = height > 0 && height <= sizes.pixels && width > 0 && width <= sizes.pixels &&
                      start >= 0 && start <= sizes.pixels &&
                      height * width <= sizes.pixels - start;
    levels[s] = fits ? Level{int(height), int(width), int(start), true} : Level{1, 1, 0, false};
  }
  __syncthreads();
}

// What a team reads of one sample: the pixels around it, in the order top left, top right, bottom
// left, bottom right, and their weights.
template <typename F>
struct alignas(16) Corners {
  unsigned pixel[4];
  F weight[4];
};

// Where a sample falls in its level.
template <typename F>
struct Footprint {
  bool hit = false;     // reaches at least one pixel
  bool inside[4] = {};  // per corner
  int pixel[4] = {};    // per corner, moved to the nearest pixel when outside: safe to read
  F x = 0, y = 0;       // position between the corners, 0 to 1

  Footprint() = default;

  __device__ Footprint(const Level& level, F location_x, F location_y) {
    F column = location_x * level.width - F(0.5), row = location_y * level.height - F(0.5);
    // False for NaN.
    hit = level.fits && column > -1 && column < level.width && row > -1 && row < level.height;
    if (!hit) column = row = 0;
    const int left = static_cast<int>(floor(column)), top = static_cast<int>(floor(row));
    x = column - left;
    y = row - top;
    for (int k = 0; k < 4; ++k) {
      const int at_x = left + k % 2, at_y = top + k / 2;
      inside[k] = hit && at_x >= 0 && at_x < level.width && at_y >= 0 && at_y < level.height;
      // The level lies within the pixels of an image, fewer than 2^31, so this fits an int.
      pixel[k] = level.start + min(max(at_y, 0), level.height - 1) * level.width +
                 min(max(at_x, 0), level.width - 1);
    }
  }

  __device__ Corners<F> corners(F weight) const {
    Corners<F> result;
    for (int k = 0; k < 4; ++k) {
      const F share = (k % 2 ? x : 1 - x) * (k / 2 ? y : 1 - y);
      result.pixel[k] = pixel[k];
      result.weight[k] = inside[k] ? weight * share : F(0);
    }
    return result;
  }
};

// The part of the work that falls to this thread.
template <int kTeam>
struct Task {
  int lane;      // within the team
  int team_bit;  // position of the team in its warp
  int slot;      // of the team's first sample in shared memory
  bool active;   // the last block of a head has teams without a query: they only keep step
  int64_t row;   // (image, query, head), flattened
  int64_t head;  // offset of the head in value, in channels

  __device__ Task(const Sizes& sizes) {
    constexpr int queries = kThreads / kTeam;
    const int thread = threadIdx.x, team = thread / kTeam;
    lane = thread % kTeam;
    team_bit = thread % 32 - lane;
    slot = team * (kTeam + 1);
    const unsigned heads = sizes.heads, blocks = (sizes.queries + queries - 1) / queries;
    const unsigned m = blockIdx.x % heads, block = blockIdx.x / heads;
    const int64_t image = block / blocks, query = int64_t(block % blocks) * queries + team;
    active = query < sizes.queries;
    row = (image * sizes.queries + (active ? query : 0)) * sizes.heads + m;
    head = (image * sizes.pixels * sizes.heads + m) * sizes.channels;
  }
};

// Room for one sample per thread. The unused one after each team keeps the teams of a warp, which
// read the same sample number at the same time, on different banks.
template <int kTeam>
constexpr int slots = kThreads / kTeam * (kTeam + 1);

extern __shared__ Level levels[];

template <typename T, typename C, int kChannels>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* __restrict__ value, const int64_t* __restrict__ shapes,
                   const int64_t* __restrict__ starts, const C* __restrict__ locations,
                   const C* __restrict__ weights, T* __restrict__ output, const Sizes sizes) {
  using F = Real<T>;
  constexpr int kWidth = forward_width<T, kChannels>, kTeam = forward_team<T, kChannels>;
  __shared__ Corners<F> corners[slots<kTeam>];
  read_levels(shapes, starts, sizes, levels);
  const Task<kTeam> task(sizes);
  const int channels = kChannels ? kChannels : sizes.channels;
  const int stride = sizes.heads * channels;  // between pixels
  const int samples = sizes.levels * sizes.points;
  locations += task.row * samples * 2;
  weights += task.row * samples;

  for (int step = 0; step < channels; step += kTeam * kWidth) {
    const int channel = step + task.lane * kWidth;
    const bool holds_channels = kChannels || channel < channels;
    F sum[kWidth] = {};
    for (int first = 0; first < samples; first += kTeam) {
      const int sample = first + task.lane;
      Corners<F> mine;
      bool hit = task.active && sample < samples;
      if (hit) {
        const F weight = static_cast<F>(weights[sample]);
        const Level level = levels[sample];
        const Footprint<F> footprint(level, static_cast<F>(locations[2 * sample]),
                                     static_cast<F>(locations[2 * sample + 1]));
        mine = footprint.corners(weight);
        hit = footprint.hit;
        if (!level.fits) {  // makes the output NaN without reading the level
          mine.weight[0] = NAN;
          hit = true;
        }
      }
      // Only samples that hit are handed over, packed: the others cost nothing and, whatever
      // `value` holds, add nothing.
      const unsigned hits = __ballot_sync(kWarp, hit) >> task.team_bit & ((1u << kTeam) - 1);
      if (hit) corners[task.slot + __popc(hits & ((1u << task.lane) - 1))] = mine;
      __syncwarp();
      const int count = holds_channels ? __popc(hits) : 0;
#pragma unroll 1
      for (int j = 0; j < count; ++j) {
        const Corners<F> at = corners[task.slot + j];
        F corner[4][kWidth];
        for (int k = 0; k < 4; ++k)
          load(pixel_at(value + task.head + channel, at.pixel[k], stride), corner[k]);
        for (int k = 0; k < 4; ++k)
          for (int i = 0; i < kWidth; ++i) sum[i] += at.weight[k] * corner[k][i];
      }
      __syncwarp();
    }
    if (task.active && holds_channels) store(output + task.row * channels + channel, sum);
  }
}

// One value for each corner of a sample.
template <typename F>
struct Quad {
  F corner[4];
};

// Returns to lane i of a team of kCount lanes the sum over the team of part(first + i). Lanes swap
// what the other half of them is to own, and so halve what they hold: kCount - 1 shuffles a value,
// not kCount log kCount. As each pair is merged at once, few values are live at a time.
template <int kCount, typename Part>
__device__ auto sum_to_owner(int lane, int first, const Part& part) {
  if constexpr (kCount == 1) {
    return part(first);
  } else {
    constexpr int half = kCount / 2;
    auto low = sum_to_owner<half>(lane, first, part);
    const auto high = sum_to_owner<half>(lane, first + half, part);
    const bool upper = lane & half;
    for (int k = 0; k < 4; ++k) {
      const auto give = upper ? low.corner[k] : high.corner[k];
      low.corner[k] = (upper ? high.corner[k] : low.corner[k]) + __shfl_xor_sync(kWarp, give, half);
    }
    return low;
  }
}

template <typename T, typename C, int kChannels>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* __restrict__ value, const int64_t* __restrict__ shapes,
                    const int64_t* __restrict__ starts, const C* __restrict__ locations,
                    const C* __restrict__ weights, const T* __restrict__ grad_output,
                    Real<T>* __restrict__ grad_value, C* __restrict__ grad_locations,
                    C* __restrict__ grad_weights, const Sizes sizes) {
  using F = Real<T>;
  constexpr int kTeam = backward_team<kChannels>, kWidth = kChannels && kVectorAtomics ? 4 : 1;
  __shared__ Corners<F> corners[slots<kTeam>];
  read_levels(shapes, starts, sizes, levels);
  const Task<kTeam> task(sizes);
  const int channels = kChannels ? kChannels : sizes.channels;
  const int stride = sizes.heads * channels;  // between pixels
  const int samples = sizes.levels * sizes.points;
  const int64_t first_sample = task.row * samples;

  for (int first = 0; first < samples; first += kTeam) {
    const int sample = first + task.lane;
    const bool mine = task.active && sample < samples;
    Level level = {};
    Footprint<F> footprint;
    F weight = 0;
    if (mine) {
      level = levels[sample];
      footprint = Footprint<F>(level, static_cast<F>(locations[2 * (first_sample + sample)]),
                               static_cast<F>(locations[2 * (first_sample + sample) + 1]));
      if (footprint.hit) weight = static_cast<F>(weights[first_sample + sample]);
    }
    corners[task.slot + task.lane] = footprint.corners(weight);
    __syncwarp();

    // Of sample j of the round: adds its part of grad_value, and returns the products of the
    // output's gradient with its corners, summed over the channels of this lane.
    const auto backpropagate = [&](int j) {
      const Corners<F> at = corners[task.slot + j];
      Quad<F> dot = {};
      for (int step = 0; step < channels; step += kTeam * kWidth) {
        const int channel = step + task.lane * kWidth;
        if (kChannels == 0 && channel >= channels) break;
        F grad[kWidth], corner[4][kWidth];
        load(grad_output + task.row * channels + channel, grad);
        for (int k = 0; k < 4; ++k)
          load(pixel_at(value + task.head + channel, at.pixel[k], stride), corner[k]);
        for (int k = 0; k < 4; ++k) {
          for (int i = 0; i < kWidth; ++i) dot.corner[k] += grad[i] * corner[k][i];
          if (at.weight[k] != 0)
            add_scaled(pixel_at(grad_value + task.head + channel, at.pixel[k], stride),
                       at.weight[k], grad);
        }
      }
      return dot;
    };
    const Quad<F> total = sum_to_owner<kTeam>(task.lane, 0, backpropagate);
    F d[4];
    for (int k = 0; k < 4; ++k) d[k] = footprint.inside[k] ? total.corner[k] : F(0);
    if (mine) {
      const F x = footprint.x, y = footprint.y;
      const F top = d[0] + x * (d[1] - d[0]), bottom = d[2] + x * (d[3] - d[2]);
      const F grad_x = (1 - y) * (d[1] - d[0]) + y * (d[3] - d[2]);
      const F location[2] = {weight * level.width * grad_x, weight * level.height * (bottom - top)};
      C* const to = grad_locations + 2 * (first_sample + sample);
      if constexpr (kChannels > 0) {
        store(to, location);
      } else {  // nothing is known of the alignment
        to[0] = static_cast<C>(location[0]);
        to[1] = static_cast<C>(location[1]);
      }
      grad_weights[first_sample + sample] = static_cast<C>(top + y * (bottom - top));
    }
    __syncwarp();
  }
}

// Makes `device` the current one for as long as it lives.
struct DeviceGuard {
  explicit DeviceGuard(int device) : error(cudaGetDevice(&previous)) {
    changed = error == cudaSuccess && device != previous;
    if (changed) error = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (changed) cudaSetDevice(previous);
  }
  DeviceGuard(const DeviceGuard&) = delete;

  int previous = 0;
  bool changed;
  cudaError_t error;
};

template <typename... Args>
cudaError_t launch(void (*kernel)(Args...), int team, const Sizes& sizes, void* stream,
                   std::common_type_t<Args>... args) {
  const int64_t queries = kThreads / team, blocks = (sizes.queries + queries - 1) / queries;
  if (sizes.images * sizes.heads > INT32_MAX / blocks) return cudaErrorInvalidValue;
  void* pointers[] = {&args...};
  return cudaLaunchKernel(kernel, dim3(sizes.images * sizes.heads * blocks), dim3(kThreads),
                          pointers, sizes.levels * sizes.points * sizeof(Level),
                          static_cast<cudaStream_t>(stream));
}

// The kernels count pixels, bytes of a pixel and samples of a query in 32 bits, and whatever is
// multiplied by images or queries in 64. (The levels must also fit into shared memory: the launch
// fails beyond some 2000 samples per query.)
bool supported(const Sizes& s) {
  constexpr int64_t limit = INT32_MAX, bytes = sizeof(double);
  return s.images >= 0 && s.images <= limit && s.queries >= 0 && s.queries <= limit &&
         s.pixels > 0 && s.pixels <= limit && s.heads > 0 && s.channels > 0 &&
         s.heads <= limit / bytes && s.channels <= limit / bytes / s.heads && s.levels > 0 &&
         s.points > 0 && s.levels <= limit / 2 && s.points <= limit / 2 / s.levels;
}

template <typename... Pointers>
bool aligned(Pointers... pointers) {
  return (reinterpret_cast<uintptr_t>(pointers) | ...) % 16 == 0;
}

// Calls run(T(), C(), channels) with the types that the two codes stand for, where channels is a
// constant: the width of the heads if it has a kernel of its own, else 0.
template <typename Run>
cudaError_t dispatch(int value_type, int coord_type, int device, const Sizes& sizes, bool vectors,
                     Run run) {
  enum { kFloat, kDouble, kHalf, kBFloat16 };
  const auto with_width = [&](auto t, auto c) {
    if constexpr (!std::is_same_v<decltype(t), double>) {
      if (vectors && sizes.channels == 16) return run(t, c, std::integral_constant<int, 16>());
      if (vectors && sizes.channels == 32) return run(t, c, std::integral_constant<int, 32>());
      if (vectors && sizes.channels == 64) return run(t, c, std::integral_constant<int, 64>());
    }
    return run(t, c, std::integral_constant<int, 0>());
  };
  const auto is = [&](int t, int c) { return value_type == t && coord_type == c; };

  if (!supported(sizes)) return cudaErrorInvalidValue;
  if (sizes.images == 0 || sizes.queries == 0) return cudaSuccess;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  if (is(kFloat, kFloat)) return with_width(float(), float());
  if (is(kDouble, kDouble)) return with_width(double(), double());
  if (is(kHalf, kHalf)) return with_width(__half(), __half());
  if (is(kHalf, kFloat)) return with_width(__half(), float());
  if (is(kBFloat16, kBFloat16)) return with_width(__nv_bfloat16(), __nv_bfloat16());
  if (is(kBFloat16, kFloat)) return with_width(__nv_bfloat16(), float());
  return cudaErrorInvalidValue;
}

}  // namespace

// All pointers are to contiguous memory of `device`; types: 0 float, 1 double, 2 half, 3 bfloat16.
// Each returns a cudaError_t, 0 for success; nothing waits for the device.
extern "C" {

int ms_deform_attn_cuda_abi() { return 1; }

const char* ms_deform_attn_cuda_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

int ms_deform_attn_cuda_forward(int value_type, int coord_type, int device, void* stream,
                                const void* value, const int64_t* spatial_shapes,
                                const int64_t* level_start_index, const void* locations,
                                const void* weights, void* output, int64_t B, int64_t S, int64_t M,
                                int64_t D, int64_t Q, int64_t L, int64_t P) {
  const Sizes sizes{B, S, M, D, Q, L, P};
  const auto run = [&](auto t, auto c, auto channels) {
    using T = decltype(t);
    using C = decltype(c);
    return launch(forward_kernel<T, C, channels>, forward_team<T, channels>, sizes, stream,
                  static_cast<const T*>(value), spatial_shapes, level_start_index,
                  static_cast<const C*>(locations), static_cast<const C*>(weights),
                  static_cast<T*>(output), sizes);
  };
  return dispatch(value_type, coord_type, device, sizes, aligned(value, output), run);
}

// grad_value, of type float (double for double), is added to; the other gradients are written.
int ms_deform_attn_cuda_backward(int value_type, int coord_type, int device, void* stream,
                                 const void* value, const int64_t* spatial_shapes,
                                 const int64_t* level_start_index, const void* locations,
                                 const void* weights, const void* grad_output, void* grad_value,
                                 void* grad_locations, void* grad_weights, int64_t B, int64_t S,
                                 int64_t M, int64_t D, int64_t Q, int64_t L, int64_t P) {
  const Sizes sizes{B, S, M, D, Q, L, P};
  const bool vectors = aligned(value, grad_output, grad_value, grad_locations);
  const auto run = [&](auto t, auto c, auto channels) {
    using T = decltype(t);
    using C = decltype(c);
    return launch(backward_kernel<T, C, channels>, backward_team<channels>, sizes, stream,
                  static_cast<const T*>(value), spatial_shapes, level_start_index,
                  static_cast<const C*>(locations), static_cast<const C*>(weights),
                  static_cast<const T*>(grad_output), static_cast<Real<T>*>(grad_value),
                  static_cast<C*>(grad_locations), static_cast<C*>(grad_weights), sizes);
  };
  return dispatch(value_type, coord_type, device, sizes, vectors, run);
}

}  // extern "C"
