// Runs the C++ kernel, forward and backward, for a processor on which torch is not at hand.
//     run_op INPUT OUTPUT
// INPUT: int64 is_double, B, S, M, D, Q, L, P; then value, spatial_shapes, level_start_index,
// locations, weights, grad_output. OUTPUT: the output, the gradients of value, locations, weights.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define SIZES int64_t B, int64_t S, int64_t M, int64_t D, int64_t Q, int64_t L, int64_t P
#define INPUTS const void*, const int64_t*, const int64_t*, const void*, const void*
int ms_deform_attn_cpu_forward(int is_double, int64_t threads, INPUTS, void*, SIZES);
int ms_deform_attn_cpu_backward(int is_double, int64_t threads, INPUTS, const void*, void*, void*,
                                void*, SIZES);

static void* take(FILE* file, int64_t bytes) {
  void* data = malloc(bytes);
  if (file && fread(data, 1, bytes, file) != (size_t)bytes) exit(10);
  return data;
}

int main(int argc, char** argv) {
  FILE* in = argc == 3 ? fopen(argv[1], "rb") : NULL;
  if (!in) return 11;
  const int64_t* n = take(in, 8 * sizeof(int64_t));
  const int64_t B = n[1], S = n[2], M = n[3], D = n[4], Q = n[5], L = n[6], P = n[7];
  const int64_t size = n[0] ? 8 : 4, values = B * S * M * D * size;
  const int64_t outputs = B * Q * M * D * size, points = B * Q * M * L * P * size;
  void* value = take(in, values);
  int64_t *shapes = take(in, L * 16), *starts = take(in, L * 8);
  void *locations = take(in, 2 * points), *weights = take(in, points), *grad = take(in, outputs);
  void *output = take(NULL, outputs), *grad_value = take(NULL, values);
  void *grad_locations = take(NULL, 2 * points), *grad_weights = take(NULL, points);
  int status = ms_deform_attn_cpu_forward(n[0], 2, value, shapes, starts, locations, weights, output,
                                          B, S, M, D, Q, L, P);
  status |= ms_deform_attn_cpu_backward(n[0], 2, value, shapes, starts, locations, weights, grad,
                                        grad_value, grad_locations, grad_weights, B, S, M, D, Q, L, P);
  FILE* out = fopen(argv[2], "wb");
  if (!out) return 12;
  fwrite(output, 1, outputs, out);
  fwrite(grad_value, 1, values, out);
  fwrite(grad_locations, 1, 2 * points, out);
  fwrite(grad_weights, 1, points, out);
  return fclose(out) ? 12 : status;
}
