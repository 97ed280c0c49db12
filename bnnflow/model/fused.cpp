// The log density of many perceptrons and its gradient, one chain after another, in blocks of rows that stay in cache.
//
// bnnflow/model/fused.py compiles this file on first use, once for each SCALAR (float, double), and says what the
// arguments mean. Rows of data are the lanes of the vectors: a block holds, for every unit, `width` vectors of rows,
// so forward products broadcast weights, and gradients by weights stay vectors of partial sums until the last block.
// No -ffast-math: NaN and infinity behave as written, only a * b + c may be contracted.

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

using T = SCALAR;

#if defined(__AVX512F__)
constexpr int kBytes = 64, kUnits = 6, kVectors = 4, kGradUnits = 4, kGradInputs = 6;  // 32 registers
#elif defined(__AVX__)
constexpr int kBytes = 32, kUnits = 6, kVectors = 2, kGradUnits = 3, kGradInputs = 4;  // 16 registers
#elif defined(__ARM_NEON)
constexpr int kBytes = 16, kUnits = 6, kVectors = 4, kGradUnits = 4, kGradInputs = 6;
#else
constexpr int kBytes = 16, kUnits = 6, kVectors = 2, kGradUnits = 3, kGradInputs = 4;
#endif
constexpr int kBlock = 16;  // vectors of rows: units * 16 stay in the second cache, and sums are seldom reloaded
constexpr int kLanes = kBytes / sizeof(T);
constexpr bool kFloat = sizeof(T) == 4;

using Bits = std::conditional_t<kFloat, uint32_t, uint64_t>;
typedef T Vec __attribute__((vector_size(kBytes)));
typedef Bits BitsVec __attribute__((vector_size(kBytes)));
typedef double DoubleVec __attribute__((vector_size(kLanes * sizeof(double))));

enum Activation : int64_t { kIdentity, kTanh, kSigmoid, kRelu, kSilu, kGelu, kGeluTanh };
enum Likelihood : int64_t { kScore, kGaussian, kHeteroscedastic, kCategorical, kBernoulli };

struct Layer {
    int64_t in, out, weight, bias, activation;  // offsets into theta; bias is -1 where there is none
};

struct Prior {  // one stretch of theta; log: theta is the logarithm of a half-normal variable
    int64_t start, stop, log;
    const T *loc, *inverse_scale;
    double constant;
};

struct Problem {
    int64_t n_layers, n_priors, dim;
    const Layer* layers;
    const Prior* priors;
    int64_t likelihood, n_targets, log_scale;  // log_scale: where theta holds the learned one, or -1
    double scale;                              // the fixed scale of a Gaussian, the least of a heteroscedastic one
};

struct Call {
    int64_t chains, n, n_data, threads;                       // n: rows evaluated; n_data: rows that exist
    int64_t theta_stride, x_stride, rows_stride;              // from chain to chain; 0 where shared
    const T *theta, *x, *y, *score;                           // x (n_data, in), y (n_data, targets), score (chains, out, n)
    const int64_t* rows;                                      // (n,) or (chains, n), or null for all rows in order
    double likelihood_weight, prior_weight;
    double* value;                                            // (chains,)
    T *grad, *outputs;                                        // (chains, dim), (chains, out, n); either may be null
};

// ---------------------------------------------------------------- elementary functions

static inline Vec splat(T value) { return value - Vec{}; }  // not + 0, which is an operation because of -0

static inline Vec load(const T* from) {
    Vec v;
    std::memcpy(&v, from, kBytes);
    return v;
}

template <int N>
static inline Vec polynomial(const T (&c)[N], Vec x) {
    Vec sum = splat(c[N - 1]);
    for (int i = N - 2; i >= 0; --i) sum = sum * x + c[i];
    return sum;
}

// v between -bound and bound; keeps NaN, for which gcc makes no minimum of a comparison.
static inline Vec clamp(Vec v, T bound) {
#if defined(__AVX512F__)
    if constexpr (kFloat) {
        return (Vec)_mm512_min_ps((__m512)splat(bound), _mm512_max_ps((__m512)splat(-bound), (__m512)v));
    } else {
        return (Vec)_mm512_min_pd((__m512d)splat(bound), _mm512_max_pd((__m512d)splat(-bound), (__m512d)v));
    }
#else
    v = splat(-bound) > v ? splat(-bound) : v;
    return splat(bound) < v ? splat(bound) : v;
#endif
}

// 2^t; saturates at 2^-126 and 2^126 (float), keeps NaN.
static inline Vec exp2(Vec t) {
    t = clamp(t, kFloat ? 126 : 1022);
    // Adding 1.5 * 2^23 rounds to an integer in the last bits; with the bias of exponents added they are those of 2^i.
    constexpr int mantissa = kFloat ? 23 : 52;
    constexpr T magic = kFloat ? T(12582912 + 127) : T(6755399441055744 + 1023);
    Vec shifted = t + magic;
    Vec f = t - (shifted - magic);  // [-1/2, 1/2]
    Vec power = (Vec)((BitsVec)shifted << mantissa);
    if constexpr (kFloat) {
        constexpr T c[] = {1.00000007549534893f, .69314720671061993f, .24022107355830399f,
                           .05550327214209201f, .00967603709787137f, .00134004321653857f};
        return polynomial(c, f) * power;
    } else {
        constexpr T c[] = {1.0, .69314718055994530835, .24022650695910159577, .055504108664821699003,
                           .0096181291075872534294, .001333355814639035047, .00015403530463727981589,
                           .000015252733856295573396, 1.3215432534254118261e-6, 1.0178051192117846665e-7,
                           7.0741945626131047707e-9, 4.4566754636398607237e-10};
        return polynomial(c, f) * power;
    }
}

static inline Vec exp(Vec a) { return exp2(a * T(1.442695040888963407)); }

static inline Vec sigmoid(Vec a) { return T(1) / (T(1) + exp2(a * T(-1.442695040888963407))); }

// log((1 + s) / (1 - s)) for |s| <= 1/3
static inline Vec log_ratio(Vec s) {
    constexpr int terms = kFloat ? 8 : 17;
    Vec square = s * s, sum = Vec{};
    for (int k = terms - 1; k >= 0; --k) sum = sum * square + T(2) / T(2 * k + 1);
    return s * sum;
}

// log(a) for positive normal a; keeps NaN, and infinity stays infinite.
static inline Vec log(Vec a) {
    constexpr int mantissa = kFloat ? 23 : 52;
    constexpr Bits root_half = kFloat ? Bits(0x3f3504f3) : Bits(0x3fe6a09e667f3bcd);
    BitsVec offset = (BitsVec)a - root_half;  // its exponent is that of a / sqrt(1/2)
    BitsVec exponent = offset & ~((Bits(1) << mantissa) - 1);
    Vec m = (Vec)((BitsVec)a - exponent);  // [sqrt(1/2), sqrt(2))
    typedef std::make_signed_t<Bits> SignedVec __attribute__((vector_size(kBytes)));
    Vec e = __builtin_convertvector((SignedVec)exponent >> mantissa, Vec);
    Vec result = e * T(.693147180559945309) + log_ratio((m - T(1)) / (m + T(1)));
    return a - a == splat(0) ? result : a;
}

// log(1 + exp(a))
static inline Vec softplus(Vec a) {
    Vec u = exp(a > splat(0) ? -a : a);
    return (a > splat(0) ? a : splat(0)) + log_ratio(u / (u + T(2)));
}

// exp(x^2) erfc(x) for x >= 0, by a polynomial in (x - 5/2) / (x + 5/2)
static inline Vec scaled_erfc(Vec x) {
    Vec scale = T(1) / (x + T(2.5)), t = (x - T(2.5)) * scale;
    if constexpr (kFloat) {
        constexpr T c[] = {1.05403167766631299f,   -.804651928827946032f, .453921377762829393f,   -.171249487428940217f,
                           .0283018635815931916f,  .00838313187398114664f, -.00464388588308589874f, -.000413924984986163483f,
                           .000483890486531241336f, .0000270071298198487854f};
        return polynomial(c, t) * scale;
    } else {
        constexpr T c[] = {1.0540318203057202,       -.804651849439273804,    .453914116647534741,
                           -.171251145236904601,     .0283615501547461313,    .00839304410565648061,
                           -.00481878588384560975,   -.000439206327099859226, .000702696665659051224,
                           .0000582973104334975137,  -.000112618898423019425, -.0000194981343547448998,
                           .0000182865817688854087,  6.68508705813314146e-6,  -2.41444694687575725e-6,
                           -1.87434477643562389e-6,  9.84621989952901565e-8,  3.79575267510576158e-7,
                           5.30408094909334141e-8,   -4.08221339752876955e-8, -1.08553458740127441e-8};
        return polynomial(c, t) * scale;
    }
}

// ---------------------------------------------------------------- activations
// Their slope follows from their value, or is kept from the forward pass where it does not.

struct Identity {
    static Vec value(Vec a, Vec*) { return a; }
    static Vec slope(Vec, const Vec*) { return splat(1); }
};

struct Tanh {
    static Vec value(Vec a, Vec*) { return T(1) - T(2) / (T(1) + exp2(a * T(2.885390081777926815))); }
    static Vec slope(Vec v, const Vec*) { return T(1) - v * v; }
};

struct Sigmoid {
    static Vec value(Vec a, Vec*) { return sigmoid(a); }
    static Vec slope(Vec v, const Vec*) { return v * (T(1) - v); }
};

struct Relu {
    static Vec value(Vec a, Vec*) { return a < splat(0) ? splat(0) : a; }  // NaN stays
    static Vec slope(Vec v, const Vec*) { return v > splat(0) ? splat(1) : splat(0); }
};

struct Silu {
    static Vec value(Vec a, Vec* slope) {
        Vec s = sigmoid(a), v = a * s;
        *slope = s + v * (T(1) - s);
        return v;
    }
    static Vec slope(Vec, const Vec* kept) { return *kept; }
};

struct Gelu {
    static Vec value(Vec a, Vec* slope) {
        Vec z = (a < splat(0) ? -a : a) * T(.707106781186547524);
        Vec density = exp(-z * z);
        Vec tail = T(.5) * density * scaled_erfc(z);
        Vec cdf = a > splat(0) ? T(1) - tail : tail;
        *slope = cdf + a * density * T(.398942280401432678);
        return a * cdf;
    }
    static Vec slope(Vec, const Vec* kept) { return *kept; }
};

struct GeluTanh {
    static Vec value(Vec a, Vec* slope) {
        constexpr T c = T(1.595769121605730711), d = T(.044715);  // 2 sqrt(2 / pi)
        Vec b = clamp(a, 16);                                     // no overflow in the cube
        Vec s = sigmoid(c * (b + d * b * b * b));
        *slope = s + b * s * (T(1) - s) * c * (T(1) + 3 * d * b * b);
        return a * s;
    }
    static Vec slope(Vec, const Vec* kept) { return *kept; }
};

// Call body with the class of an activation.
template <class Body>
static inline void dispatch(int64_t activation, Body body) {
    switch (activation) {
        case kIdentity: return body(Identity{});
        case kTanh: return body(Tanh{});
        case kSigmoid: return body(Sigmoid{});
        case kRelu: return body(Relu{});
        case kSilu: return body(Silu{});
        case kGelu: return body(Gelu{});
        case kGeluTanh: return body(GeluTanh{});
    }
}

// Turn pre-activations into values.
static void activate(int64_t activation, Vec* value, Vec* slope, int64_t count) {
    if (activation == kIdentity) return;
    dispatch(activation, [&](auto f) {
        for (int64_t i = 0; i < count; ++i) value[i] = f.value(value[i], slope + i);
    });
}

// Carry delta (units, width) from values back to pre-activations, and add its sums over rows to those of the biases.
static void chain_rule(int64_t activation, const Vec* value, const Vec* slope, int64_t units, int64_t width, Vec* delta,
                       Vec* bias) {
    dispatch(activation, [&](auto f) {
        for (int64_t u = 0, i = 0; u < units; ++u) {
            Vec sum{};
            for (int64_t end = i + width; i < end; ++i) {
                delta[i] *= f.slope(value[i], slope + i);
                sum += delta[i];
            }
            if (bias) bias[u] += sum;
        }
    });
}

// ---------------------------------------------------------------- products

// Call body with the constants 0 to N - 1. A loop would be unrolled too, but only after arrays are out of registers.
template <class Body, int... I>
static inline __attribute__((always_inline)) void unrolled(std::integer_sequence<int, I...>, Body body) {
    (body(std::integral_constant<int, I>{}), ...);
}
template <int N, class Body>
static inline __attribute__((always_inline)) void unrolled(Body body) {
    unrolled(std::make_integer_sequence<int, N>{}, body);
}

// out[u][r] = bias[u] + sum over k of w[u * by_unit + k * by_input] * h[k][r], for U units and R vectors of rows
template <int U, int R>
static void product_tile(const T* w, int64_t by_unit, int64_t by_input, const T* bias, const Vec* h, int64_t depth,
                         int64_t width, Vec* out) {
    Vec sum[U][R], row[R];
    unrolled<U>([&](auto u) { unrolled<R>([&](auto r) { sum[u][r] = bias ? splat(bias[u]) : Vec{}; }); });
    for (int64_t k = 0; k < depth; ++k, w += by_input, h += width) {
        unrolled<R>([&](auto r) { row[r] = h[r]; });
        unrolled<U>([&](auto u) {
            Vec weight = splat(w[u * by_unit]);
            unrolled<R>([&](auto r) { sum[u][r] += weight * row[r]; });
        });
    }
    unrolled<U>([&](auto u) { unrolled<R>([&](auto r) { out[u * width + r] = sum[u][r]; }); });
}

// sums[u * inputs + k] += delta[u][.] * h[k][.], for U units and K inputs
template <int U, int K>
static void gradient_tile(const Vec* delta, const Vec* h, int64_t width, int64_t inputs, Vec* sums) {
    Vec sum[U][K], row[K];
    unrolled<U>([&](auto u) { unrolled<K>([&](auto k) { sum[u][k] = sums[u * inputs + k]; }); });
    for (int64_t r = 0; r < width; ++r) {
        unrolled<K>([&](auto k) { row[k] = h[k * width + r]; });
        unrolled<U>([&](auto u) {
            Vec d = delta[u * width + r];
            unrolled<K>([&](auto k) { sum[u][k] += d * row[k]; });
        });
    }
    unrolled<U>([&](auto u) { unrolled<K>([&](auto k) { sums[u * inputs + k] = sum[u][k]; }); });
}

// Tables of every tile up to the largest, indexed by size - 1.
template <int C, int... I>
static constexpr auto product_tiles(std::integer_sequence<int, I...>) {
    using Tile = decltype(&product_tile<1, 1>);
    struct Table { Tile at[sizeof...(I)]; };
    return Table{{product_tile<I / C + 1, I % C + 1>...}};
}
template <int C, int... I>
static constexpr auto gradient_tiles(std::integer_sequence<int, I...>) {
    using Tile = decltype(&gradient_tile<1, 1>);
    struct Table { Tile at[sizeof...(I)]; };
    return Table{{gradient_tile<I / C + 1, I % C + 1>...}};
}
constexpr auto kProducts = product_tiles<kVectors>(std::make_integer_sequence<int, kUnits * kVectors>());
constexpr auto kGradients = gradient_tiles<kGradInputs>(std::make_integer_sequence<int, kGradUnits * kGradInputs>());

// Cut `size` into the fewest pieces of at most `most`, as equal as can be.
template <class Body>
static inline void tiled(int64_t size, int most, Body body) {
    int64_t pieces = (size + most - 1) / most;
    for (int64_t start = 0; pieces > 0; --pieces) {
        int64_t piece = (size - start + pieces - 1) / pieces;
        body(start, piece);
        start += piece;
    }
}

// Compute all units, and hand every group of rows of `out` (first unit, units) to `finish` while it is in cache.
template <class Finish>
static void product(const T* w, int64_t by_unit, int64_t by_input, const T* bias, const Vec* h, int64_t depth,
                    int64_t units, int64_t width, Vec* out, Finish finish) {
    tiled(units, kUnits, [&](int64_t u, int64_t some) {
        tiled(width, kVectors, [&](int64_t r, int64_t vectors) {
            kProducts.at[(some - 1) * kVectors + vectors - 1](w + u * by_unit, by_unit, by_input, bias ? bias + u : nullptr,
                                                              h + r, depth, width, out + u * width + r);
        });
        finish(u, some);
    });
}

static void gradient(const Vec* delta, const Vec* h, int64_t units, int64_t inputs, int64_t width, Vec* sums) {
    tiled(inputs, kGradInputs, [&](int64_t k, int64_t some_inputs) {
        tiled(units, kGradUnits, [&](int64_t u, int64_t some_units) {
            kGradients.at[(some_units - 1) * kGradInputs + some_inputs - 1](delta + u * width, h + k * width, width, inputs,
                                                                            sums + u * inputs + k);
        });
    });
}

template <int N>
static inline T sum_lanes(const T* v) {
    if constexpr (N == 1) {
        return *v;
    } else {
        typedef T Half __attribute__((vector_size(N / 2 * sizeof(T))));
        Half low, high;
        std::memcpy(&low, v, sizeof(Half));
        std::memcpy(&high, v + N / 2, sizeof(Half));
        low += high;
        return sum_lanes<N / 2>(reinterpret_cast<const T*>(&low));
    }
}

// A sum in double precision.
struct Sum {
    DoubleVec lanes{};
    void add(Vec v) { lanes += __builtin_convertvector(v, DoubleVec); }
    double total() const {
        double sum = 0;
        for (int l = 0; l < kLanes; ++l) sum += lanes[l];
        return sum;
    }
};

// ---------------------------------------------------------------- likelihoods

// A block of rows: out and score are (units, width), y is (targets, width); lanes past the last row score zero.
struct Block {
    int64_t units, targets, width;
    const Vec *out, *y;
    Vec* score;
    Vec kept;  // of the last vector: 1 for a row, 0 past the end

    Vec keep(Vec v, int64_t r) const { return r + 1 < width ? v : kept > splat(0) ? v : Vec{}; }
};

// Sum of squared standardised residuals; value and the score of the scale follow from it.
static void gaussian(const Block& b, T inverse_scale, Sum& squares) {
    for (int64_t k = 0; k < b.units; ++k)
        for (int64_t r = 0; r < b.width; ++r) {
            int64_t i = k * b.width + r;
            Vec z = b.keep((b.y[i] - b.out[i]) * inverse_scale, r);
            squares.add(z * z);
            b.score[i] = z * inverse_scale;
        }
}

static void heteroscedastic(const Block& b, T least, Sum& value) {
    for (int64_t k = 0; k < b.targets; ++k)
        for (int64_t r = 0; r < b.width; ++r) {
            int64_t mean = k * b.width + r, raw = mean + b.targets * b.width;
            Vec scale = (b.out[raw] > splat(20) ? b.out[raw] : softplus(b.out[raw])) + least;  // torch's threshold
            Vec z = (b.y[mean] - b.out[mean]) / scale;
            value.add(b.keep(T(-.5) * z * z - log(scale), r));
            b.score[mean] = b.keep(z / scale, r);
            b.score[raw] = b.keep((z * z - T(1)) / scale * sigmoid(b.out[raw]), r);
        }
}

static void categorical(const Block& b, Sum& value) {
    for (int64_t r = 0; r < b.width; ++r) {
        Vec most = b.out[r];
        for (int64_t k = 1; k < b.units; ++k) most = b.out[k * b.width + r] > most ? b.out[k * b.width + r] : most;
        Vec sum{}, chosen{};
        for (int64_t k = 0; k < b.units; ++k) {
            Vec above = b.out[k * b.width + r] - most, e = exp(above);
            b.score[k * b.width + r] = e;
            sum += e;
            chosen += b.y[r] == splat(T(k)) ? above : Vec{};
        }
        value.add(b.keep(chosen - log(sum), r));
        Vec inverse = T(1) / sum;
        for (int64_t k = 0; k < b.units; ++k) {
            Vec hit = b.y[r] == splat(T(k)) ? splat(1) : Vec{};
            b.score[k * b.width + r] = b.keep(hit - b.score[k * b.width + r] * inverse, r);
        }
    }
}

static void bernoulli(const Block& b, Sum& value) {
    for (int64_t r = 0; r < b.width; ++r) {
        value.add(b.keep(-softplus(b.y[r] > splat(0) ? -b.out[r] : b.out[r]), r));
        b.score[r] = b.keep(b.y[r] - sigmoid(b.out[r]), r);
    }
}

// ---------------------------------------------------------------- one chain

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the rows are cut and how the memory of one worker is laid out; sizes in vectors.
struct Plan {
    int64_t width, blocks, units = 0, widest = 0, inputs;  // width: vectors of a full block

    Plan(const Problem& p, const Call& c) {
        for (int64_t l = 0; l < p.n_layers; ++l) {
            units += p.layers[l].out;
            widest = std::max(widest, p.layers[l].out);
        }
        inputs = p.layers[0].in + p.n_targets;
        int64_t vectors = divide_up(c.n, kLanes);
        blocks = divide_up(vectors, kBlock);
        width = divide_up(vectors, blocks);
        blocks = divide_up(vectors, width);
    }

    int64_t scratch(const Problem& p) const { return (inputs + 2 * units + 2 * widest) * width + p.dim; }
};

// Copy a block of rows to (units, width); what is past the end repeats the last row, so that it stays harmless.
static void pack(const T* data, int64_t columns, const int64_t* rows, int64_t start, int64_t n, int64_t width, Vec* to) {
    T* lanes = reinterpret_cast<T*>(to);
    for (int64_t i = 0; i < width * kLanes; ++i) {
        int64_t row = std::min(start + i, n - 1);
        const T* from = data + (rows ? rows[row] : row) * columns;
        for (int64_t k = 0; k < columns; ++k) lanes[k * width * kLanes + i] = from[k];
    }
}

struct Worker {
    const Problem& p;
    const Call& c;
    const Plan& plan;
    const Vec* shared;  // packed blocks of data that every chain uses, or null
    Vec* scratch;

    void run(int64_t chain) const {
        const T* theta = c.theta + chain * c.theta_stride;
        Vec* sums = scratch + (plan.inputs + 2 * plan.units + 2 * plan.widest) * plan.width;
        std::fill(sums, sums + p.dim, Vec{});
        Sum value;
        bool learned = p.log_scale >= 0;
        T inverse_scale = p.likelihood == kGaussian ? T(1 / (learned ? std::exp(double(theta[p.log_scale])) : p.scale)) : T(0);
        for (int64_t block = 0; block < plan.blocks; ++block) block_of_rows(chain, block, theta, inverse_scale, sums, value);
        if (!c.grad) return;
        T* grad = c.grad + chain * p.dim;
        for (int64_t i = 0; i < p.dim; ++i) grad[i] = sum_lanes<kLanes>(reinterpret_cast<const T*>(sums + i));
        double total = value.total(), targets = double(c.n) * p.n_targets;
        if (p.likelihood == kGaussian) {
            double log_scale = learned ? double(theta[p.log_scale]) : std::log(p.scale);
            if (learned) grad[p.log_scale] = T(c.likelihood_weight * (total - targets));
            total = -.5 * total - targets * (log_scale + kHalfLog2Pi);
        } else if (p.likelihood == kHeteroscedastic) {
            total -= targets * kHalfLog2Pi;
        }
        total *= c.likelihood_weight;
        if (c.prior_weight != 0)
            for (int64_t i = 0; i < p.n_priors; ++i) total += c.prior_weight * prior(p.priors[i], theta, grad);
        c.value[chain] = total;
    }

  private:
    static constexpr double kHalfLog2Pi = .91893853320467274178;

    void block_of_rows(int64_t chain, int64_t block, const T* theta, T inverse_scale, Vec* sums, Sum& value) const {
        int64_t start = block * plan.width * kLanes;
        int64_t width = std::min(plan.width, divide_up(c.n - start, kLanes));
        Vec *own = scratch, *values = own + plan.inputs * plan.width, *slopes = values + plan.units * plan.width;
        Vec *delta = slopes + plan.units * plan.width, *next = delta + plan.widest * plan.width;
        const Vec* x = own;
        if (shared) {
            x = shared + block * plan.inputs * plan.width;
        } else {
            pack_block(p, c, chain, start, width, own);
        }
        const Vec* h = x;
        Vec *value_end = values, *slope_end = slopes;
        for (int64_t l = 0; l < p.n_layers; ++l) {
            const Layer& layer = p.layers[l];
            product(theta + layer.weight, layer.in, 1, layer.bias < 0 ? nullptr : theta + layer.bias, h, layer.in, layer.out,
                    width, value_end, [&](int64_t u, int64_t some) {
                        activate(layer.activation, value_end + u * width, slope_end + u * width, some * width);
                    });
            h = value_end;
            value_end += layer.out * width;
            slope_end += layer.out * width;
        }
        const Layer& last = p.layers[p.n_layers - 1];
        if (c.outputs) copy_rows<true>(c.outputs + chain * last.out * c.n, last.out, start, width, const_cast<Vec*>(h));
        if (!c.grad) return;
        score(Block{last.out, p.n_targets, width, h, x + p.layers[0].in * width, delta, kept(start, width)}, chain, start,
              inverse_scale, value);
        // From here value_end, slope_end and delta belong to the layer that the loop comes to.
        auto finish = [&](const Layer& layer, Vec* delta, int64_t u, int64_t some) {
            chain_rule(layer.activation, value_end + u * width, slope_end + u * width, some, width, delta + u * width,
                       layer.bias < 0 ? nullptr : sums + layer.bias + u);
        };
        for (int64_t l = p.n_layers - 1; l >= 0; --l) {
            const Layer& layer = p.layers[l];
            value_end -= layer.out * width;
            slope_end -= layer.out * width;
            if (l == p.n_layers - 1) {
                finish(layer, delta, 0, layer.out);
            } else {
                const Layer& after = p.layers[l + 1];
                product(theta + after.weight, 1, after.in, nullptr, delta, after.out, after.in, width, next,
                        [&](int64_t u, int64_t some) { finish(layer, next, u, some); });
                std::swap(delta, next);
            }
            gradient(delta, l > 0 ? value_end - layer.in * width : x, layer.out, layer.in, width, sums + layer.weight);
        }
    }

    void score(const Block& b, int64_t chain, int64_t start, T inverse_scale, Sum& value) const {
        switch (p.likelihood) {
            case kScore: copy_rows<false>(const_cast<T*>(c.score) + chain * b.units * c.n, b.units, start, b.width, b.score); break;
            case kGaussian: gaussian(b, inverse_scale, value); break;
            case kHeteroscedastic: heteroscedastic(b, T(p.scale), value); break;
            case kCategorical: categorical(b, value); break;
            case kBernoulli: bernoulli(b, value); break;
        }
        if (c.likelihood_weight != 1)
            for (int64_t i = 0; i < b.units * b.width; ++i) b.score[i] *= T(c.likelihood_weight);
    }

    // Copy a block (units, width) to columns of (units, n), or back with zeros past the end.
    template <bool out>
    void copy_rows(T* rows, int64_t units, int64_t start, int64_t width, Vec* block) const {
        int64_t count = std::min(width * kLanes, c.n - start);
        for (int64_t u = 0; u < units; ++u) {
            if (out) {
                std::memcpy(rows + u * c.n + start, block + u * width, count * sizeof(T));
            } else {
                block[(u + 1) * width - 1] = Vec{};
                std::memcpy(block + u * width, rows + u * c.n + start, count * sizeof(T));
            }
        }
    }

    Vec kept(int64_t start, int64_t width) const {
        Vec v{};
        for (int l = 0; l < kLanes; ++l) v[l] = start + (width - 1) * kLanes + l < c.n;
        return v;
    }

    // Add the gradient of one stretch's log density to grad, and return the density.
    double prior(const Prior& prior, const T* theta, T* grad) const {
        Sum squares;
        double tail = 0, total = prior.constant;
        T weight = T(c.prior_weight);
        int64_t i = prior.start;
        const T *loc = prior.loc - i, *inverse = prior.inverse_scale - i;
        if (prior.log) {
            for (; i < prior.stop; ++i) {
                double z = std::exp(double(theta[i])) * inverse[i];
                tail += z * z;
                total += double(theta[i]);
                grad[i] += T(c.prior_weight * (1 - z * z));
            }
        }
        for (; i + kLanes <= prior.stop; i += kLanes) {
            Vec scale = load(inverse + i), z = (load(theta + i) - load(loc + i)) * scale;
            squares.add(z * z);
            Vec g = load(grad + i) - weight * z * scale;
            std::memcpy(grad + i, &g, kBytes);
        }
        for (; i < prior.stop; ++i) {
            T z = (theta[i] - loc[i]) * inverse[i];
            tail += double(z) * z;
            grad[i] -= weight * z * inverse[i];
        }
        return total - .5 * (squares.total() + tail);
    }

  public:
    static void pack_block(const Problem& p, const Call& c, int64_t chain, int64_t start, int64_t width, Vec* to) {
        const int64_t* rows = c.rows ? c.rows + chain * c.rows_stride : nullptr;
        int64_t in = p.layers[0].in;
        pack(c.x + chain * c.x_stride, in, rows, start, c.n, width, to);
        if (p.n_targets) pack(c.y, p.n_targets, rows, start, c.n, width, to + in * width);
    }
};

struct Free {
    void operator()(Vec* memory) const { operator delete(memory, std::align_val_t(kBytes)); }
};

static std::unique_ptr<Vec, Free> vectors(int64_t count) {
    return std::unique_ptr<Vec, Free>(static_cast<Vec*>(operator new(count * kBytes, std::align_val_t(kBytes))));
}

// Return 0, 1 for a row that does not exist, or 2 for want of memory.
extern "C" int bnnflow_evaluate(const Problem* problem, const Call* call) try {
    const Problem& p = *problem;
    const Call& c = *call;
    if (c.rows)
        for (int64_t chain = 0; chain < (c.rows_stride ? c.chains : 1); ++chain)
            for (int64_t i = 0; i < c.n; ++i)
                if (uint64_t(c.rows[chain * c.rows_stride + i]) >= uint64_t(c.n_data)) return 1;
    const Plan plan(p, c);
    std::unique_ptr<Vec, Free> shared;
    if (!c.x_stride && !c.rows_stride && c.chains > 1) {
        shared = vectors(plan.blocks * plan.inputs * plan.width);
        for (int64_t block = 0; block < plan.blocks; ++block) {
            int64_t start = block * plan.width * kLanes, width = std::min(plan.width, divide_up(c.n - start, kLanes));
            Worker::pack_block(p, c, 0, start, width, shared.get() + block * plan.inputs * plan.width);
        }
    }
    int64_t workers = std::max<int64_t>(1, std::min(c.threads, c.chains)), size = plan.scratch(p);
    auto memory = vectors(workers * size);
    // Every chain is computed alone, so that results do not depend on the number of threads.
    auto work = [&](int64_t worker) {
        Worker one{p, c, plan, shared.get(), memory.get() + worker * size};
        for (int64_t chain = c.chains * worker / workers; chain < c.chains * (worker + 1) / workers; ++chain) one.run(chain);
    };
    std::vector<std::thread> threads;
    for (int64_t worker = 1; worker < workers; ++worker) try {
            threads.emplace_back(work, worker);
        } catch (const std::system_error&) {
            work(worker);  // the system gives no more threads
        }
    work(0);
    for (auto& thread : threads) thread.join();
    return 0;
} catch (const std::bad_alloc&) {
    return 2;
}
