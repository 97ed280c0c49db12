// The log density of many perceptrons and its gradient, one chain after another, in blocks of rows that stay in cache;
// at the end random numbers, what samplers do with them, and assignment problems.
//
// bnnflow/compiled/routines.py compiles this file on first use, once for each SCALAR (float, double), and says what the
// arguments mean. Rows of data are the lanes of the vectors: a block holds, for every unit, `width` vectors of rows,
// so forward products broadcast weights, and gradients by weights stay vectors of partial sums until the last block.
// No -ffast-math: NaN and infinity behave as written, only a * b + c may be contracted.

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#define INLINE __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

using T = SCALAR;

#if defined(__AVX512F__)
constexpr int kBytes = 64, kUnits = 6, kVectors = 4, kGradUnits = 3, kGradInputs = 8;  // 32 registers
#elif defined(__AVX__)
constexpr int kBytes = 32, kUnits = 6, kVectors = 2, kGradUnits = 3, kGradInputs = 4;  // 16 registers
#elif defined(__ARM_NEON)
constexpr int kBytes = 16, kUnits = 6, kVectors = 4, kGradUnits = 4, kGradInputs = 6;
#else
constexpr int kBytes = 16, kUnits = 6, kVectors = 2, kGradUnits = 3, kGradInputs = 4;
#endif
constexpr int kBlock = 32;  // vectors of rows: units * 32 stay in the second cache, and sums are seldom reloaded
constexpr int kLanes = kBytes / sizeof(T);
constexpr bool kFloat = sizeof(T) == 4;

using Bits = std::conditional_t<kFloat, uint32_t, uint64_t>;
typedef T Vec __attribute__((vector_size(kBytes)));
typedef Bits BitsVec __attribute__((vector_size(kBytes)));
typedef std::make_signed_t<Bits> SignedVec __attribute__((vector_size(kBytes)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));

enum Activation : int64_t { kIdentity, kTanh, kSigmoid, kRelu, kSilu, kGelu, kGeluTanh, kSine };
enum Likelihood : int64_t {
    kScore, kGaussian, kHeteroscedastic, kCategorical, kBernoulli, kStudent, kPoisson, kNegativeBinomial, kOrdinal,
    kHeteroscedasticStudent
};
enum Family : int64_t { kNormal, kLogHalfNormal, kLaplace, kStudentPrior, kLogHalfCauchy, kLogGamma };

struct Layer {
    int64_t in, out, weight, bias, activation;  // offsets into theta; bias is -1 where there is none
    double frequency;                           // of kSine
};

struct Prior {  // one stretch of theta; in kLog... theta is the logarithm of a variable
    int64_t start, stop, family;
    const T *loc, *inverse_scale, *df;  // in kLogGamma 1, or -1 where its inverse is meant; the rate; the shape
    double constant;
};

struct Scale {  // of weights that are normal around zero, its logarithm the sum of an offset and parameters in theta
    int64_t global, local, slab;  // -1 where there is none; with a slab 1 / variance has 1 / c^2 more
    double offset;
    int64_t weights;  // that share it
};

struct Run {  // neighbours in theta that share a scale
    int64_t start, stop, scale;
};

struct Problem {
    int64_t n_layers, n_priors, dim;
    const Layer* layers;
    const Prior* priors;
    int64_t likelihood, n_targets, n_classes;  // n_targets: columns of y, but for that of the weights of rows
    int64_t weighted;                          // whether y has such a column, behind the others
    int64_t learned;                           // where theta holds the logarithms of the likelihood's parameters, or -1
    double scale;                              // fixed scale or dispersion; the least scale of a heteroscedastic law
    double df;                                 // degrees of freedom of Student's t, where they are fixed
    double log_slope;                          // added to the log likelihood of a row, for targets in other units
    int64_t n_scales, n_runs;                  // of weights whose prior has parameters, the first of theta
    const Scale* scales;
    const Run* runs;

    int64_t columns() const { return n_targets + weighted; }
};

struct Call {
    int64_t chains, n, n_data, threads;                       // n: rows evaluated; n_data: rows that exist
    int64_t drawn;                                            // whether a key draws the rows: (chains, n), stratified
    uint64_t key;
    int64_t theta_stride, x_stride, y_stride, rows_stride;    // from chain to chain; 0 where shared
    const T *theta, *x, *y, *score;                           // x (n_data, in), y (n_data, targets), score (chains, out, n)
    const int64_t* rows;                                      // (n,) or (chains, n), or null for all rows in order
    const double* weights;                                    // (chains, 2): of the log likelihood, of the log prior
    int64_t weights_stride;
    double* value;                                            // (chains,)
    T *grad, *outputs;                                        // (chains, dim), (chains, out, n); either may be null
};

struct Dynamics {  // kicks by gradients and drifts between them, in coordinates that scale maps to weights
    int64_t microcanonical;               // velocities are of unit length, and turn
    int64_t steps, drifts;                // drifts of a step; a kick comes before the first, and one after each
    const double *kick, *drift;           // (chains, drifts + 1), (chains, drifts): parts of the time of a step
    int64_t kick_stride, drift_stride, time_stride, scale_stride;  // from chain to chain; 0 where shared
    const T *time, *scale;                // (chains,), (chains, dim)
    T *theta, *velocity;                  // (chains, dim); they, and value and grad of the call, go on from what they hold
    double* error;                        // (steps, chains): change of the energy, of microcanonical steps
    const uint64_t* keys;                 // (steps,): after each, velocities are partly drawn anew; or null
    double share;                         // of what is drawn
};

// ---------------------------------------------------------------- elementary functions

static inline Vec splat(T value) { return value - Vec{}; }  // not + 0, which is an operation because of -0

static inline Vec load(const T* from) {
    Vec v;
    std::memcpy(&v, from, kBytes);
    return v;
}

static inline void store(Vec v, T* to) { std::memcpy(to, &v, kBytes); }

// Lane i is lane I_i of a and b, side by side.
template <int... I>
static inline Vec shuffled(Vec a, Vec b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, BitsVec{Bits(I)...});
#endif
}

// 1 / x for x between 1 and 2^127; keeps NaN. In single precision by one of Newton's steps, within an ulp or two.
static inline Vec inverse(Vec x) {
#if defined(__AVX512F__)
    if constexpr (kFloat) {
        Vec r = (Vec)_mm512_rcp14_ps((__m512)x);
        return r + r * (T(1) - x * r);
    }
#endif
    return T(1) / x;
}

static inline Vec square_root(Vec x) {
    T lanes[kLanes];
    store(x, lanes);
    for (int l = 0; l < kLanes; ++l) lanes[l] = std::sqrt(lanes[l]);
    return load(lanes);
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

// 2^t; saturates, keeps NaN.
static inline Vec exp2(Vec t) {
#if defined(__AVX512DQ__)
    if constexpr (kFloat) {
        constexpr T c[] = {.99999999576313525f, .69315462000319944f, .24014077009184015f,
                           .05586328265924882f, .00894621466634761f, .00189510729099489f};
        Vec f = (Vec)_mm512_reduce_ps((__m512)t, 9);  // t less the integer below
        return (Vec)_mm512_scalef_ps((__m512)polynomial(c, f), (__m512)t);
    }
#endif
    // Between 2^-126 and 2^126 (float).
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
    Vec e = __builtin_convertvector((SignedVec)exponent >> mantissa, Vec);
    Vec result = e * T(.693147180559945309) + log_ratio((m - T(1)) * inverse(m + T(1)));
    return a - a == splat(0) ? result : a;
}

// log(1 + a), also where rounding 1 + a loses most of a
static inline Vec log1p(Vec a) {
    Vec u = a + T(1);
    return log(u) + (a - (u - T(1))) / u;
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
// Each leaves its slope for the backward pass, but for Tanh, whose slope is 1 - value^2.

struct Tanh {
    static Vec value(Vec a, Vec*) { return T(1) - T(2) / (T(1) + exp2(a * T(2.885390081777926815))); }
};

struct Sigmoid {
    static Vec value(Vec a, Vec* slope) {
        Vec v = sigmoid(a);
        *slope = v * (T(1) - v);
        return v;
    }
};

struct Relu {
    static Vec value(Vec a, Vec* slope) {
        *slope = a > splat(0) ? splat(1) : splat(0);
        return a < splat(0) ? splat(0) : a;  // NaN stays
    }
};

struct Silu {
    static Vec value(Vec a, Vec* slope) {
        Vec s = sigmoid(a), v = a * s;
        *slope = s + v * (T(1) - s);
        return v;
    }
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
};

struct GeluTanh {
    static Vec value(Vec a, Vec* slope) {
        constexpr T c = T(1.595769121605730711), d = T(.044715);  // 2 sqrt(2 / pi)
        Vec b = clamp(a, 16);                                     // no overflow in the cube
        Vec s = sigmoid(c * (b + d * b * b * b));
        *slope = s + b * s * (T(1) - s) * c * (T(1) + 3 * d * b * b);
        return a * s;
    }
};

// sin(w0 a): the angle less a multiple of pi, whose parity is a sign, and minimax polynomials on [-pi/2, pi/2].
struct Sine {
    T w0;
    Vec value(Vec a, Vec* slope) const {
        constexpr T magic = kFloat ? T(12582912) : T(6755399441055744);  // 1.5 * 2^mantissa rounds to an integer
        constexpr T high = kFloat ? T(3.140625) : T(3.1415926534682512);
        constexpr T middle = kFloat ? T(9.67502593994140625e-4) : T(1.21542009963449e-10);
        constexpr T low = kFloat ? T(1.509957990978376e-7) : T(1.6667485837041758e-19);
        Vec z = a * w0, shifted = z * T(.318309886183790672) + magic, turns = shifted - magic;
        Vec r = clamp(((z - turns * high) - turns * middle) - turns * low, 2);  // bounded even where no digit is left
        Vec square = r * r, sine, cosine;
        if constexpr (kFloat) {
            constexpr T s[] = {-.166666476347f, .00833289982377f, -.000198008977871f, 2.59048854621e-6f};
            constexpr T c[] = {1, -.499999993585f, .0416666362581f, -.00138883614007f, 2.4760161375e-5f, -2.60514956e-7f};
            sine = r + r * square * polynomial(s, square), cosine = polynomial(c, square);
        } else {
            constexpr T s[] = {-.166666666666666619,      .0083333333333329931195,    -.00019841269841159450323,
                               2.7557319204580634624e-6,  -2.5052106381089568708e-8,  1.6058918644260092484e-10,
                               -7.6425116840901783831e-13, 2.7166654767541163479e-15};
            constexpr T c[] = {1,                         -.49999999999999974309,    .041666666666663887971,
                               -.0013888888888773172445,  .000024801587277443986352, -2.7557316393538413396e-7,
                               2.0876561960281254097e-9,  -1.1462904903283013782e-11, 4.6090074145874798172e-14};
            sine = r + r * square * polynomial(s, square), cosine = polynomial(c, square);
        }
        BitsVec odd = (BitsVec)shifted << (kFloat ? 31 : 63);
        *slope = (Vec)((BitsVec)(cosine * w0) ^ odd);
        return (Vec)((BitsVec)sine ^ odd);
    }
};

// Turn pre-activations into values.
static void activate(const Layer& layer, Vec* value, Vec* slope, int64_t count) {
    auto with = [&](auto f) {
        for (int64_t i = 0; i < count; ++i) value[i] = f.value(value[i], slope + i);
    };
    switch (layer.activation) {
        case kIdentity: break;
        case kTanh: with(Tanh{}); break;
        case kSigmoid: with(Sigmoid{}); break;
        case kRelu: with(Relu{}); break;
        case kSilu: with(Silu{}); break;
        case kGelu: with(Gelu{}); break;
        case kGeluTanh: with(GeluTanh{}); break;
        case kSine: with(Sine{T(layer.frequency)}); break;
    }
}

// ---------------------------------------------------------------- products

// Call body with the constants 0 to N - 1. A loop would be unrolled too, but only after arrays are out of registers.
template <class Body, int... I>
static inline INLINE void unrolled(std::integer_sequence<int, I...>, [[maybe_unused]] Body body) {
    (body(std::integral_constant<int, I>{}), ...);
}
template <int N, class Body>
static inline INLINE void unrolled(Body body) {
    unrolled(std::make_integer_sequence<int, N>{}, body);
}

// v, a vector or a number, held in a register: gcc reads it from memory again wherever it is used, and loads are as
// scarce as products.
template <class V>
static inline __attribute__((always_inline)) V in_register(V v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__AVX__)
    asm("" : "+x"(v));
#elif defined(__ARM_NEON)
    asm("" : "+w"(v));
#endif
    return v;
}

// at + by, computed here: gcc would keep an address in a register for every vector.
template <class Pointer>
static inline __attribute__((always_inline)) Pointer step(Pointer at, int64_t by) {
    at += by;
    asm("" : "+r"(at));
    return at;
}

// out[u][r] = bias[u] + sum over k of w[u * by_unit + k * by_input] * h[k][r], for U units and R vectors of rows; where
// slope is given, times slope[u][r] (squared: times 1 - slope[u][r]^2), and where sums are, added over rows to sums[u].
template <int U, int R>
static void product_tile(const T* w, int64_t by_unit, int64_t by_input, const T* bias, const Vec* h, int64_t depth,
                         int64_t width, const Vec* slope, bool squared, Vec* sums, Vec* out) {
    Vec sum[U][R], row[R];
    unrolled<U>([&](auto u) { unrolled<R>([&](auto r) { sum[u][r] = bias ? splat(bias[u]) : Vec{}; }); });
    for (int64_t k = 0; k < depth; ++k, w += by_input, h += width) {
        unrolled<R>([&](auto r) { row[r] = h[r]; });
        unrolled<U>([&](auto u) {
            Vec weight = splat(w[u * by_unit]);
            unrolled<R>([&](auto r) { sum[u][r] += weight * row[r]; });
        });
    }
    unrolled<U>([&](auto u) {
        if (slope) {
            if (squared) {
                unrolled<R>([&](auto r) { sum[u][r] *= T(1) - slope[r] * slope[r]; });
            } else {
                unrolled<R>([&](auto r) { sum[u][r] *= slope[r]; });
            }
            slope = step(slope, width);
        }
        if (sums) {
            Vec total = sum[u][0];
            unrolled<R - 1>([&](auto r) { total += sum[u][r + 1]; });
            sums[u] += total;
        }
        unrolled<R>([&](auto r) { out[r] = sum[u][r]; });
        out = step(out, width);
    });
}

// sums[u * inputs + k] += delta[u][.] * h[k][.], for U units and K inputs
template <int U, int K>
static void gradient_tile(const Vec* delta, const Vec* h, int64_t width, int64_t inputs, Vec* sums) {
    Vec sum[U][K], d[U];
    const Vec* from = sums;
    unrolled<U>([&](auto u) {
        unrolled<K>([&](auto k) { sum[u][k] = from[k]; });
        from = step(from, inputs);
    });
    for (int64_t r = 0; r < width; ++r) {
        unrolled<U>([&](auto u) { d[u] = in_register(delta[u * width + r]); });
        unrolled<K>([&](auto k) {
            Vec row = in_register(h[k * width + r]);
            unrolled<U>([&](auto u) { sum[u][k] += d[u] * row; });
        });
    }
    unrolled<U>([&](auto u) {
        unrolled<K>([&](auto k) { sums[k] = sum[u][k]; });
        sums = step(sums, inputs);
    });
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
    if (size == 0) return;
    const int64_t pieces = (size + most - 1) / most, least = size / pieces, larger = size % pieces;
    for (int64_t i = 0, start = 0; i < pieces; ++i) {
        int64_t piece = least + (i < larger);
        body(start, piece);
        start += piece;
    }
}

// Compute all units, and hand every group of rows of `out` (first unit, units) to `finish` while it is in cache; unless
// they are to be kept, each group then takes the place of the one before.
template <class Finish>
static void product(const T* w, int64_t by_unit, int64_t by_input, const T* bias, const Vec* h, int64_t depth,
                    int64_t units, int64_t width, const Vec* slope, bool squared, Vec* sums, Vec* out, bool keep,
                    Finish finish) {
    tiled(units, kUnits, [&](int64_t u, int64_t some) {
        Vec* group = keep ? out + u * width : out;
        tiled(width, kVectors, [&](int64_t r, int64_t vectors) {
            kProducts.at[(some - 1) * kVectors + vectors - 1](
                w + u * by_unit, by_unit, by_input, bias ? bias + u : nullptr, h + r, depth, width,
                slope ? slope + u * width + r : nullptr, squared, sums ? sums + u : nullptr, group + r);
        });
        finish(u, some);
    });
}

static void gradient(const Vec* delta, const Vec* h, int64_t units, int64_t inputs, int64_t width, int64_t stride,
                     Vec* sums) {
    tiled(inputs, kGradInputs, [&](int64_t k, int64_t some_inputs) {
        tiled(units, kGradUnits, [&](int64_t u, int64_t some_units) {
            kGradients.at[(some_units - 1) * kGradInputs + some_inputs - 1](delta + u * width, h + k * width, width, stride,
                                                                            sums + u * stride + k);
        });
    });
}

template <int S, int... I>
static inline Vec paired(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return shuffled<(I & S ? kLanes + I : I)...>(a, b) + shuffled<(I & S ? kLanes + (I ^ S) : I ^ S)...>(a, b);
}

// Lane i is the sum of the lanes of v[i], for 2 S vectors; it is repeated where there are fewer vectors than lanes.
template <int S = kLanes / 2>
static inline Vec sum_lanes(const Vec* v) {
    if constexpr (S == 0) {
        return *v;
    } else {
        return paired<S>(sum_lanes<S / 2>(v), sum_lanes<S / 2>(v + S), std::make_integer_sequence<int, kLanes>{});
    }
}

// A sum in double precision.
struct Sum {
    static constexpr int kParts = sizeof(double) / sizeof(T);
    typedef T Part __attribute__((vector_size(kBytes / kParts)));
    typedef double DoubleVec __attribute__((vector_size(kBytes)));
    DoubleVec parts[kParts]{};
    void add(Vec v) {
        Part part[kParts];
        std::memcpy(part, &v, kBytes);
        for (int k = 0; k < kParts; ++k) parts[k] += __builtin_convertvector(part[k], DoubleVec);
    }
    double total() const {
        double sum = 0;
        for (int k = 0; k < kParts; ++k)
            for (int l = 0; l < kLanes / kParts; ++l) sum += parts[k][l];
        return sum;
    }
};

// ---------------------------------------------------------------- likelihoods

// A block of rows: out and score are (units, width), y is (targets, width); lanes past the last row score zero.
struct Block {
    int64_t units, targets, width;
    const Vec *out, *y, *weight;  // weight: how often each row counts, or null where each does once
    Vec* score;
    Vec kept;  // of the last vector: 1 for a row, 0 past the end

    // What is linear in the weights of rows, with these.
    Vec keep(Vec v, int64_t r) const {
        if (weight) v *= weight[r];
        return r + 1 < width ? v : kept > splat(0) ? v : Vec{};
    }
};

// Sum of squared standardised residuals; value and the score of the scale follow from it.
static void gaussian(const Block& b, T inverse_scale, Sum& squares) {
    for (int64_t k = 0; k < b.units; ++k)
        for (int64_t r = 0; r < b.width; ++r) {
            int64_t i = k * b.width + r;
            Vec z = (b.y[i] - b.out[i]) * inverse_scale;
            squares.add(b.keep(z * z, r));
            b.score[i] = b.keep(z * inverse_scale, r);
        }
}

static inline Vec scale_of(Vec raw, T least) { return (raw > splat(20) ? raw : softplus(raw)) + least; }  // torch's threshold

static void heteroscedastic(const Block& b, T least, Sum& value) {
    for (int64_t k = 0; k < b.targets; ++k)
        for (int64_t r = 0; r < b.width; ++r) {
            int64_t mean = k * b.width + r, raw = mean + b.targets * b.width;
            Vec scale = scale_of(b.out[raw], least);
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

// Sums of log(1 + z^2 / df), and of z times the standardised score, from which that of the scale follows.
static void student(const Block& b, T inverse_scale, T df, Sum& value, Sum& by_scale) {
    for (int64_t k = 0; k < b.units; ++k)
        for (int64_t r = 0; r < b.width; ++r) {
            int64_t i = k * b.width + r;
            Vec z = (b.y[i] - b.out[i]) * inverse_scale, square = z * z;
            Vec pull = (df + T(1)) * z * inverse(df + square);
            value.add(b.keep(log1p(square * (T(1) / df)), r));
            by_scale.add(b.keep(pull * z, r));
            b.score[i] = b.keep(pull * inverse_scale, r);
        }
}

// Log density of Student's t at zero.
static double student_constant(double df) {
    const double half = df / 2, log_2pi = 1.83787706640934548356;
    const double series = (-1. / 8 + 1 / (192 * half * half)) / half;  // Stirling's, where the difference loses digits
    return (half > 200 ? series : std::lgamma(half + .5) - std::lgamma(half) - .5 * std::log(half)) - .5 * log_2pi;
}

// Its derivative by df: the gaps digamma(x + 1/2) - digamma(x) of x + 1, x + 2, ... shrink as a series in 1 / x.
static double student_slope(double df) {
    double x = df / 2, gap = 0;
    for (; x < 12; ++x) gap += 1 / x - 1 / (x + .5);
    const double u = 1 / (x * x);
    gap += 1 / (2 * x) + u * (1. / 8 + u * (-1. / 64 + u * (1. / 128 - u * 17. / 2048)));
    return .5 * (gap - 1 / df);
}

// The same with scales from the network: but for constants the log density, and the score of df.
static void heteroscedastic_student(const Block& b, T least, T df, Sum& value, Sum& by_df) {
    for (int64_t k = 0; k < b.targets; ++k)
        for (int64_t r = 0; r < b.width; ++r) {
            int64_t mean = k * b.width + r, raw = mean + b.targets * b.width;
            Vec scale = scale_of(b.out[raw], least);
            Vec z = (b.y[mean] - b.out[mean]) / scale, square = z * z;
            Vec pull = (df + T(1)) * z * inverse(df + square), tail = log1p(square * (T(1) / df));
            value.add(b.keep(T(-.5) * (df + T(1)) * tail - log(scale), r));
            by_df.add(b.keep(T(.5) * (pull * z * (T(1) / df) - tail), r));
            b.score[mean] = b.keep(pull / scale, r);
            b.score[raw] = b.keep((pull * z - T(1)) / scale * sigmoid(b.out[raw]), r);
        }
}

// exp(a), infinite where it would saturate.
static inline Vec unbounded_exp(Vec a) {
    return a > splat(kFloat ? T(87.33) : T(708.39)) ? splat(std::numeric_limits<T>::infinity()) : exp(a);
}

// Counts y with rates exp(out); behind the columns of counts are those of log(y!).
static void poisson(const Block& b, Sum& value) {
    for (int64_t i = 0, k = 0; k < b.units; ++k)
        for (int64_t r = 0; r < b.width; ++r, ++i) {
            Vec rate = unbounded_exp(b.out[i]);
            value.add(b.keep(b.y[i] * b.out[i] - rate - b.y[i + b.units * b.width], r));
            b.score[i] = b.keep(b.y[i] - rate, r);
        }
}

// The same with means exp(out) and a dispersion, without what depends on counts and dispersion alone:
// y out - (y + 1 / dispersion) log(1 + dispersion exp(out)) - log(y!).
static void negative_binomial(const Block& b, T dispersion, T log_dispersion, Sum& value, Sum& by_log) {
    const T r = T(1) / dispersion;
    for (int64_t i = 0, k = 0; k < b.units; ++k)
        for (int64_t row = 0; row < b.width; ++row, ++i) {
            Vec y = b.y[i], logit = b.out[i] + log_dispersion;
            Vec grown = r * softplus(logit), score = y * sigmoid(-logit) - r * sigmoid(logit);
            value.add(b.keep(y * (b.out[i] - softplus(logit)) - grown - b.y[i + b.units * b.width], row));
            by_log.add(b.keep(grown + score - y, row));
            b.score[i] = b.keep(score, row);
        }
}

// Ordered classes with cutpoints; sums, of the classes one after another: by the cutpoint above, by that below, and of
// the weights of rows.
static void ordinal(const Block& b, int64_t classes, const T* cutpoints, Sum& value, Vec* sums) {
    for (int64_t r = 0; r < b.width; ++r) {
        Vec y = b.y[r], above{}, below{};
        for (int64_t k = 0; k + 1 < classes; ++k) {
            above = y == splat(T(k)) ? splat(cutpoints[k]) : above;
            below = y == splat(T(k + 1)) ? splat(cutpoints[k]) : below;
        }
        above -= b.out[r], below -= b.out[r];
        const auto lowest = y == splat(0), highest = y == splat(T(classes - 1));
        value.add(b.keep((highest ? Vec{} : -softplus(-above)) - (lowest ? Vec{} : softplus(below)), r));
        Vec by_above = b.keep(highest ? Vec{} : sigmoid(-above), r), by_below = b.keep(lowest ? Vec{} : sigmoid(below), r);
        b.score[r] = by_below - by_above;
        for (int64_t k = 0; k < classes; ++k) {
            const auto here = y == splat(T(k));
            sums[k] += here ? by_above : Vec{};
            sums[classes + k] += here ? by_below : Vec{};
            sums[2 * classes + k] += b.keep(here ? splat(1) : Vec{}, r);
        }
    }
}

static double sum_of(Vec v) {
    double sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += v[l];
    return sum;
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
        inputs = p.layers[0].in + p.columns();
        int64_t vectors = divide_up(c.n, kLanes);
        blocks = std::max<int64_t>(1, divide_up(vectors, kBlock));
        width = std::max<int64_t>(1, divide_up(vectors, blocks));
        blocks = divide_up(vectors, width);  // none where there are no rows
    }

    int64_t scratch(const Problem& p) const {
        return (inputs + 2 * units + 2 * widest) * width + sums(p) + 3 * p.n_classes;
    }
    int64_t sums(const Problem& p) const { return divide_up(p.dim, kLanes) * kLanes; }
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
    const Vec* shared;  // packed blocks of data that every chain uses, its targets perhaps not; or null
    Vec* scratch;
    double likelihood_weight = 0, prior_weight = 0;  // of the present chain

    void run(int64_t chain) {
        likelihood_weight = c.weights[chain * c.weights_stride];
        prior_weight = c.weights[chain * c.weights_stride + 1];
        const T* theta = c.theta + chain * c.theta_stride;
        Vec* sums = scratch + (plan.inputs + 2 * plan.units + 2 * plan.widest) * plan.width;
        Given given(p, theta, sums + plan.sums(p));
        std::fill(sums, sums + plan.sums(p) + 3 * p.n_classes, Vec{});
        for (int64_t block = 0; block < plan.blocks; ++block) block_of_rows(chain, block, theta, given, sums);
        if (!c.grad) return;
        T* grad = c.grad + chain * p.dim;
        int64_t i = 0;
        for (; i + kLanes <= p.dim; i += kLanes) store(sum_lanes(sums + i), grad + i);
        if (i < p.dim) {
            Vec rest = sum_lanes(sums + i);
            std::memcpy(grad + i, &rest, (p.dim - i) * sizeof(T));
        }
        const double likelihood = finished(chain, theta, given, grad) + p.log_slope * counted(given);
        double total = likelihood_weight * likelihood;
        if (prior_weight != 0)
            for (int64_t i = 0; i < p.n_priors; ++i) total += prior_weight * prior(p.priors[i], theta, grad);
        if (prior_weight != 0 && p.n_scales) total += prior_weight * scaled_weights(theta, grad);
        c.value[chain] = total;
    }

  private:
    static constexpr double kHalfLog2Pi = .91893853320467274178;

    // What a chain has of the likelihood: its parameters, and what sums over rows.
    struct Given {
        double scale = 1, log_scale = 0;  // of noise, or a dispersion
        double df = 0;
        T inverse = 0;
        std::vector<T> cutpoints;
        Vec* classes;  // see ordinal
        Sum value, by_parameter, rows;

        Given(const Problem& p, const T* theta, Vec* classes) : classes(classes) {
            if (p.likelihood == kOrdinal) {
                double cutpoint = 0;
                for (int64_t k = 0; k + 1 < p.n_classes; ++k) {
                    cutpoint += k ? std::exp(double(theta[p.learned + k - 1])) : 0;
                    cutpoints.push_back(T(cutpoint));
                }
                return;
            }
            df = p.df;
            if (p.likelihood == kHeteroscedasticStudent) {
                if (p.learned >= 0) df = 2 + std::exp(double(theta[p.learned]));
                return;
            }
            log_scale = p.learned >= 0 ? double(theta[p.learned]) : std::log(p.scale);
            scale = p.learned >= 0 ? std::exp(log_scale) : p.scale;
            inverse = T(1 / scale);
        }
    };

    // How many rows count.
    double counted(const Given& given) const { return p.weighted ? given.rows.total() : double(c.n); }

    // Return the log likelihood from the sums, and set the gradient by the likelihood's parameters.
    double finished(int64_t chain, const T* theta, const Given& given, T* grad) const {
        double total = given.value.total(), by_parameter = given.by_parameter.total();
        const double targets = counted(given) * p.n_targets;
        switch (p.likelihood) {
            case kGaussian:
                by_parameter = total - targets;
                total = -.5 * total - targets * (given.log_scale + kHalfLog2Pi);
                break;
            case kHeteroscedastic: total -= targets * kHalfLog2Pi; break;
            case kStudent:
                by_parameter -= targets;
                total = targets * (student_constant(p.df) - given.log_scale) - .5 * (p.df + 1) * total;
                break;
            case kHeteroscedasticStudent:
                total += targets * student_constant(given.df);
                by_parameter = (given.df - 2) * (by_parameter + targets * student_slope(given.df));
                break;
            case kNegativeBinomial: dispersed(chain, given.scale, total, by_parameter); break;
            case kOrdinal: return total + gaps(theta, given, grad);
        }
        if (p.learned >= 0) grad[p.learned] = T(likelihood_weight * by_parameter);
        return total;
    }

    // Add what depends on counts and dispersion alone: the sum over j < y of log(1 + j dispersion), in every row.
    void dispersed(int64_t chain, double dispersion, double& total, double& by_log) const {
        const int64_t* rows = c.rows ? c.rows + chain * c.rows_stride : nullptr;
        std::vector<double> rows_above;  // by count
        for (int64_t i = 0; i < c.n; ++i)
            for (int64_t k = 0; k < p.n_targets / 2; ++k) {
                const T* y = c.y + (rows ? rows[i] : i) * p.columns();
                const auto count = size_t(y[k]);
                if (count >= rows_above.size()) rows_above.resize(count + 1);
                rows_above[count] += p.weighted ? double(y[p.n_targets]) : 1;
            }
        double above = 0;
        for (size_t j = rows_above.size(); j-- > 0;) {
            const double grown = double(j) * dispersion;
            total += above * std::log1p(grown);
            by_log += above * grown / (1 + grown);
            above += rows_above[j];
        }
    }

    // Set the gradient by the logarithms of the gaps, and return what depends on them and the labels alone.
    double gaps(const T* theta, const Given& given, T* grad) const {
        const int64_t classes = p.n_classes;
        double total = 0, above = 0, below = 0;  // sums over the classes from k on, over those beyond k
        for (int64_t k = classes - 2; k >= 1; --k) {
            const double gap = std::exp(double(theta[p.learned + k - 1])), rows = sum_of(given.classes[2 * classes + k]);
            above += sum_of(given.classes[k]);
            below += sum_of(given.classes[classes + k + 1]);
            total += rows ? rows * std::log(-std::expm1(-gap)) : 0;
            const double own = rows ? rows / std::expm1(gap) : 0;
            grad[p.learned + k - 1] = T(likelihood_weight * gap * (above - below + own));
        }
        return total;
    }

    void block_of_rows(int64_t chain, int64_t block, const T* theta, Given& given, Vec* sums) const {
        int64_t start = block * plan.width * kLanes;
        int64_t width = std::min(plan.width, divide_up(c.n - start, kLanes));
        Vec *own = scratch, *values = own + plan.inputs * plan.width, *slopes = values + plan.units * plan.width;
        Vec *delta = slopes + plan.units * plan.width, *next = delta + plan.widest * plan.width;
        const int64_t in = p.layers[0].in * width;
        const Vec *x = own, *y = own + in;
        if (shared) {
            x = shared + block * plan.inputs * plan.width;
            if (c.y_stride) {
                pack_targets(p, c, chain, start, width, own + in);
            } else {
                y = x + in;
            }
        } else {
            pack_block(p, c, chain, start, width, own);
        }
        const Vec* h = x;
        Vec *value_end = values, *slope_end = slopes;
        for (int64_t l = 0; l < p.n_layers; ++l) {
            const Layer& layer = p.layers[l];
            product(theta + layer.weight, layer.in, 1, layer.bias < 0 ? nullptr : theta + layer.bias, h, layer.in, layer.out,
                    width, nullptr, false, nullptr, value_end, true, [&](int64_t u, int64_t some) {
                        activate(layer, value_end + u * width, slope_end + u * width, some * width);
                    });
            h = value_end;
            value_end += layer.out * width;
            slope_end += layer.out * width;
        }
        const Layer& last = p.layers[p.n_layers - 1];
        if (c.outputs) copy_rows<true>(c.outputs + chain * last.out * c.n, last.out, start, width, const_cast<Vec*>(h));
        if (!c.grad) return;
        const Vec* weight = p.weighted ? y + p.n_targets * width : nullptr;
        score(Block{last.out, p.n_targets, width, h, y, weight, delta, kept(start, width)}, chain, start, given);
        const Layer* layer = &last;
        slope_end -= last.out * width;
        for (int64_t u = 0, i = 0; u < last.out; ++u) {
            Vec sum{};
            for (int64_t end = i + width; i < end; ++i) {
                if (last.activation == kTanh) {
                    delta[i] *= T(1) - h[i] * h[i];
                } else if (last.activation != kIdentity) {
                    delta[i] *= slope_end[i];
                }
                sum += delta[i];
            }
            if (last.bias >= 0) sums[last.bias + u] += sum;
        }
        // From here value_end, slope_end and delta belong to the layer that the loop comes to.
        for (value_end -= last.out * width; layer > p.layers; --layer) {
            const Layer& before = layer[-1];
            value_end -= before.out * width;
            slope_end -= before.out * width;
            const bool first = &before == p.layers, tanh = before.activation == kTanh;
            product(theta + layer->weight, 1, layer->in, nullptr, delta, layer->out, layer->in, width,
                    before.activation == kIdentity ? nullptr : tanh ? value_end : slope_end, tanh,
                    before.bias < 0 ? nullptr : sums + before.bias, next, !first, [&](int64_t u, int64_t some) {
                        gradient(delta, value_end + u * width, layer->out, some, width, layer->in, sums + layer->weight + u);
                        if (first)
                            gradient(next, x, some, before.in, width, before.in, sums + before.weight + u * before.in);
                    });
            std::swap(delta, next);
        }
        if (p.n_layers == 1) gradient(delta, x, layer->out, layer->in, width, layer->in, sums + layer->weight);
    }

    void score(const Block& b, int64_t chain, int64_t start, Given& given) const {
        Sum& value = given.value;
        if (b.weight)
            for (int64_t r = 0; r < b.width; ++r) given.rows.add(b.keep(splat(1), r));
        switch (p.likelihood) {
            case kScore: copy_rows<false>(const_cast<T*>(c.score) + chain * b.units * c.n, b.units, start, b.width, b.score); break;
            case kGaussian: gaussian(b, given.inverse, value); break;
            case kHeteroscedastic: heteroscedastic(b, T(p.scale), value); break;
            case kCategorical: categorical(b, value); break;
            case kBernoulli: bernoulli(b, value); break;
            case kStudent: student(b, given.inverse, T(p.df), value, given.by_parameter); break;
            case kHeteroscedasticStudent:
                heteroscedastic_student(b, T(p.scale), T(given.df), value, given.by_parameter);
                break;
            case kPoisson: poisson(b, value); break;
            case kNegativeBinomial:
                negative_binomial(b, T(given.scale), T(given.log_scale), value, given.by_parameter);
                break;
            case kOrdinal: ordinal(b, p.n_classes, given.cutpoints.data(), value, given.classes); break;
        }
        if (likelihood_weight != 1)
            for (int64_t i = 0; i < b.units * b.width; ++i) b.score[i] *= T(likelihood_weight);
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
        if (prior.family == kNormal) return normal_prior(prior, theta, grad);
        double total = prior.constant, squares = 0;
        for (int64_t i = prior.start; i < prior.stop; ++i) {
            const int64_t k = i - prior.start;
            const double inverse = prior.inverse_scale[k], z = (double(theta[i]) - prior.loc[k]) * inverse;
            double slope = 0;
            if (prior.family == kLaplace) {
                total -= std::abs(z);
                slope = z > 0 ? -inverse : z < 0 ? inverse : z;  // NaN stays
            } else if (prior.family == kStudentPrior) {
                const double df = prior.df[k];
                total -= .5 * (df + 1) * std::log1p(z * z / df);
                slope = -(df + 1) * z / (df + z * z) * inverse;
            } else if (prior.family == kLogHalfCauchy) {
                const double u = double(theta[i]) - prior.loc[k];
                total -= std::abs(u) + std::log1p(std::exp(-2 * std::abs(u)));
                slope = -std::tanh(u);
            } else if (prior.family == kLogGamma) {
                const double sign = prior.loc[k], u = sign * theta[i], mean = prior.inverse_scale[k] * std::exp(u);
                total += prior.df[k] * u - mean;
                slope = sign * (prior.df[k] - mean);
            } else {
                const double scaled = std::exp(double(theta[i])) * inverse;
                squares += scaled * scaled;
                total += double(theta[i]);
                slope = 1 - scaled * scaled;
            }
            grad[i] += T(prior_weight * slope);
        }
        return total - .5 * squares;
    }

    // Add the gradient of the log density of weights given their scales to grad, and return the density.
    double scaled_weights(const T* theta, T* grad) const {
        struct Known { double inverse, share, squares; };  // share: of changes of the variance, what is not the slab's
        std::vector<Known> known(p.n_scales);
        double total = 0;
        for (int64_t k = 0; k < p.n_scales; ++k) {
            const Scale& scale = p.scales[k];
            double log_scale = scale.offset, share = 1;
            if (scale.global >= 0) log_scale += theta[scale.global];
            if (scale.local >= 0) log_scale += theta[scale.local];
            if (scale.slab >= 0) {
                const double slab = theta[scale.slab], above = slab - 2 * log_scale, small = std::exp(-std::abs(above));
                log_scale = .5 * (std::min(slab, 2 * log_scale) - std::log1p(small));
                share = (above > 0 ? 1 : small) / (1 + small);
            }
            known[k] = {std::exp(-log_scale), share, 0};
            total -= scale.weights * (log_scale + kHalfLog2Pi);
        }
        for (int64_t k = 0; k < p.n_runs; ++k) {
            const Run& run = p.runs[k];
            Known& own = known[run.scale];
            const T inverse = T(own.inverse), back = T(prior_weight * own.inverse);
            int64_t i = run.start;
            if (i + kLanes <= run.stop) {
                Sum squares;
                for (; i + kLanes <= run.stop; i += kLanes) {
                    Vec z = load(theta + i) * inverse;
                    squares.add(z * z);
                    store(load(grad + i) - back * z, grad + i);
                }
                own.squares += squares.total();
            }
            for (; i < run.stop; ++i) {
                const T z = theta[i] * inverse;
                own.squares += double(z) * z;
                grad[i] -= back * z;
            }
        }
        for (int64_t k = 0; k < p.n_scales; ++k) {
            const Scale& scale = p.scales[k];
            const double slope = prior_weight * (known[k].squares - scale.weights), share = known[k].share;
            total -= .5 * known[k].squares;
            if (scale.global >= 0) grad[scale.global] += T(slope * share);
            if (scale.local >= 0) grad[scale.local] += T(slope * share);
            if (scale.slab >= 0) grad[scale.slab] += T(.5 * slope * (1 - share));
        }
        return total;
    }

    double normal_prior(const Prior& prior, const T* theta, T* grad) const {
        Sum squares;
        double tail = 0;
        T weight = T(prior_weight);
        int64_t i = prior.start;
        const T *loc = prior.loc - i, *inverse = prior.inverse_scale - i;
        for (; i + kLanes <= prior.stop; i += kLanes) {
            Vec scale = load(inverse + i), z = (load(theta + i) - load(loc + i)) * scale;
            squares.add(z * z);
            store(load(grad + i) - weight * z * scale, grad + i);
        }
        for (; i < prior.stop; ++i) {
            T z = (theta[i] - loc[i]) * inverse[i];
            tail += double(z) * z;
            grad[i] -= weight * z * inverse[i];
        }
        return prior.constant - .5 * (squares.total() + tail);
    }

  public:
    static void pack_block(const Problem& p, const Call& c, int64_t chain, int64_t start, int64_t width, Vec* to) {
        const int64_t* rows = c.rows ? c.rows + chain * c.rows_stride : nullptr;
        int64_t in = p.layers[0].in;
        pack(c.x + chain * c.x_stride, in, rows, start, c.n, width, to);
        if (p.columns()) pack_targets(p, c, chain, start, width, to + in * width);
    }

    static void pack_targets(const Problem& p, const Call& c, int64_t chain, int64_t start, int64_t width, Vec* to) {
        const int64_t* rows = c.rows ? c.rows + chain * c.rows_stride : nullptr;
        pack(c.y + chain * c.y_stride, p.columns(), rows, start, c.n, width, to);
    }
};

struct Free {
    void operator()(Vec* memory) const { operator delete(memory, std::align_val_t(kBytes)); }
};

static std::unique_ptr<Vec, Free> vectors(int64_t count) {
    return std::unique_ptr<Vec, Free>(static_cast<Vec*>(operator new(count * kBytes, std::align_val_t(kBytes))));
}

// ---------------------------------------------------------------- random numbers

constexpr int kStreams = 4;  // vectors of counters at a time, to hide latencies
constexpr int kCounters = kStreams * kBytes / sizeof(uint32_t);

template <int N>
static inline Words rotated(Words w) {
#if defined(__AVX512F__)
    return (Words)_mm512_rol_epi32((__m512i)w, N);
#else
    return w << N | w >> (32 - N);
#endif
}

// Threefry-2x32 with 20 rounds (Salmon et al. 2011): two random words of a key for each counter from `start`, a multiple
// of kCounters.
static inline INLINE void threefry(uint64_t key, uint64_t start, Words* a, Words* b) {
    constexpr int turns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
    const uint32_t keys[3] = {uint32_t(key), uint32_t(key >> 32), uint32_t(key) ^ uint32_t(key >> 32) ^ 0x1bd11bdau};
    Words lanes;
    for (int l = 0; l < kCounters / kStreams; ++l) lanes[l] = l;
    unrolled<kStreams>([&](auto k) INLINE {
        a[k] = lanes + (uint32_t(start) + k * (kCounters / kStreams) + keys[0]);
        b[k] = Words{} + (uint32_t(start >> 32) + keys[1]);
    });
    unrolled<5>([&](auto i) INLINE {
        unrolled<4>([&](auto j) INLINE {
            unrolled<kStreams>([&](auto k) INLINE {
                a[k] += b[k];
                b[k] = rotated<turns[i % 2][j]>(b[k]) ^ a[k];
            });
        });
        unrolled<kStreams>([&](auto k) INLINE {
            a[k] += keys[(i + 1) % 3];
            b[k] += keys[(i + 2) % 3] + uint32_t(i + 1);
        });
    });
}

// Standard normal numbers by Box and Muller's method, from random bits.
static inline INLINE void normal(BitsVec bits, BitsVec more, Vec& one, Vec& other) {
    constexpr T unit = kFloat ? T(1) / T(uint64_t(1) << 31) : T(1) / T(uint64_t(1) << 63);
    // Small numbers keep their leading bits: in single precision the tails end at 6.7, in double at 9.4.
    Vec u = (__builtin_convertvector((SignedVec)(bits >> 1), Vec) + T(.5)) * unit;  // (0, 1]
    Vec radius = square_root(T(-2) * log(u));
    Vec half = __builtin_convertvector((SignedVec)more, Vec) * (T(.5) * unit);  // of the angle, in turns of pi: [-1/2, 1/2]
    Vec square = half * half, sine, cosine;
    if constexpr (kFloat) {
        constexpr T s[] = {3.14159264f, -5.167710077f, 2.550077387f, -.5982904113f, .07765591228f};
        constexpr T c[] = {1, -4.934802137f, 4.058709155f, -1.335211949f, .2349370686f, -.0243959321f};
        sine = half * polynomial(s, square), cosine = polynomial(c, square);
    } else {
        constexpr T s[] = {3.1415926535897932378,  -5.1677127800499696077,    2.5501640398773004745,
                           -.59926452931894468132, .08214588657310289502,     -.0073704305059169434047,
                           .00046629981618983938,  -.000021903497074626017191, 7.6978267682241906454e-7};
        constexpr T c[] = {1,                      -4.9348022005446767673,    4.0587121264164969995,
                           -1.3352627688434470934, .23533063012953285391,     -.02580688873700220327,
                           .0019295562724817131482, -.00010456655338748738169, 4.1495643539425855122e-6};
        sine = half * polynomial(s, square), cosine = polynomial(c, square);
    }
    one = radius * (T(1) - T(2) * sine * sine);
    other = radius * (T(2) * sine * cosine);
}

// Fill `out` with `count` standard normal numbers of a key, from the one numbered `first` on.
static void normals(uint64_t key, int64_t first, int64_t count, T* out) {
    constexpr int64_t many = 2 * kStreams * kLanes;
    for (int64_t block = first / many, start = block * many - first; start < count; ++block, start += many) {
        Words a[kStreams], b[kStreams];
        Vec pairs[2 * kStreams];
        threefry(key, uint64_t(block) * kCounters, a, b);
        unrolled<kStreams>([&](auto k) INLINE { normal((BitsVec)a[k], (BitsVec)b[k], pairs[2 * k], pairs[2 * k + 1]); });
        const int64_t from = std::max<int64_t>(0, -start), to = std::min(many, count - start);
        if (to - from == many) {
            std::memcpy(out + start, pairs, sizeof(pairs));
        } else {
            std::memcpy(out + start + from, reinterpret_cast<const T*>(pairs) + from, (to - from) * sizeof(T));
        }
    }
}

extern "C" void bnnflow_normals(uint64_t key, int64_t count, T* out) { normals(key, 0, count, out); }

// A step of Langevin dynamics: out = theta + drift * metric * grad + spread * sqrt(metric) * noise, (chains, dim) each.
extern "C" void bnnflow_langevin(uint64_t key, int64_t chains, int64_t dim, const T* theta, const T* grad, const T* metric,
                                 const T* root, int64_t metric_stride, double drift, double spread, T* out) {
    bnnflow_normals(key, chains * dim, out);
    const T a = T(drift), b = T(spread);
    for (int64_t chain = 0; chain < chains; ++chain) {
        for (int64_t i = 0; i < dim; ++i) out[i] = theta[i] + a * metric[i] * grad[i] + b * root[i] * out[i];
        theta += dim, grad += dim, out += dim, metric += metric_stride, root += metric_stride;
    }
}

// The length of the longest grad * root of all chains; infinite if a value or a gradient is not finite.
extern "C" double bnnflow_longest(int64_t chains, int64_t dim, const T* grad, const T* root, int64_t root_stride,
                                  const double* value) {
    double longest = 0;
    for (int64_t chain = 0; chain < chains; ++chain, grad += dim, root += root_stride) {
        Vec squares{};
        int64_t i = 0;
        for (; i + kLanes <= dim; i += kLanes) {
            Vec z = load(grad + i) * load(root + i);
            squares += z * z;
        }
        double sum = 0;
        for (; i < dim; ++i) sum += double(grad[i] * root[i]) * (grad[i] * root[i]);
        for (int l = 0; l < kLanes; ++l) sum += squares[l];
        if (!std::isfinite(sum) || !std::isfinite(value[chain])) return INFINITY;
        longest = std::max(longest, sum);
    }
    return std::sqrt(longest);
}

// Draw the rows of stratified batches (batches, size): the n rows are cut into equal stretches, one row is of each.
extern "C" void bnnflow_rows(uint64_t key, int64_t batches, int64_t size, int64_t n, int64_t* rows) {
    const double stretch = double(n) / double(size);
    Words words[2 * kStreams];
    uint64_t bits[kCounters], start = 0;
    int64_t used = kCounters;
    for (int64_t batch = 0; batch < batches; ++batch)
        for (int64_t i = 0; i < size; ++i, ++used) {
            if (used == kCounters) {
                threefry(key, start, words, words + kStreams);
                std::memcpy(bits, words, sizeof(bits));
                start += kCounters;
                used = 0;
            }
            double where = double(i) + double(int64_t(bits[used] >> 11)) * 0x1p-53;
            *rows++ = std::min(int64_t(where * stretch), n - 1);
        }
}

// ---------------------------------------------------------------- dynamics

// Sum over dim of a * b, in double precision whatever T.
static double inner(int64_t dim, const T* a, const T* b) {
    constexpr int many = 16;
    double sums[many] = {}, sum = 0;
    int64_t i = 0;
    for (; i + many <= dim; i += many)
        for (int l = 0; l < many; ++l) sums[l] += double(a[i + l]) * double(b[i + l]);
    for (; i < dim; ++i) sum += double(a[i]) * double(b[i]);
    for (double part : sums) sum += part;
    return sum;
}

// Give a vector unit length. This and turn are never inlined: wherever they are called they round alike.
static NOINLINE void normalise(int64_t dim, T* v) {
    const T length = T(std::sqrt(inner(dim, v, v)));
    for (int64_t i = 0; i < dim; ++i) v[i] /= length;
}

// Turn a direction for a time towards a constant gradient, and return by how much the kinetic energy changes. The
// formulas are those of momentum_update in bnnflow/dynamics.py.
static NOINLINE double turn(int64_t dim, T* direction, const T* grad, double time) {
    const double tiny = std::numeric_limits<T>::min(), factor = double(std::max<int64_t>(1, dim - 1));
    const double least = std::pow(double(std::numeric_limits<T>::epsilon()), .75);
    double norm = std::sqrt(inner(dim, grad, grad));
    norm = norm < tiny ? tiny : norm;  // NaN stays, here and below
    double along = inner(dim, direction, grad) / norm;
    along = along > 1 ? 1 : along < -1 ? -1 : along;
    const double delta = time * norm / factor;
    double decay = std::exp(-delta);
    decay = decay < least ? least : decay;
    const T a = T(2 * decay), b = T((1 - decay) * (1 + along + decay * (1 - along)) / norm);
    for (int64_t i = 0; i < dim; ++i) direction[i] = a * direction[i] + b * grad[i];
    normalise(dim, direction);
    const double with = std::log((1 + along) / 2) + delta, against = std::log((1 - along) / 2) - delta;
    return double(dim - 1) * (std::max(with, against) + std::log1p(std::exp(-std::abs(with - against))));
}

extern "C" void bnnflow_normalise(int64_t chains, int64_t dim, T* v) {
    for (int64_t chain = 0; chain < chains; ++chain) normalise(dim, v + chain * dim);
}

extern "C" void bnnflow_turn(int64_t chains, int64_t dim, T* direction, const T* grad, const T* time, int64_t time_stride,
                             double* change) {
    for (int64_t chain = 0; chain < chains; ++chain)
        change[chain] = turn(dim, direction + chain * dim, grad + chain * dim, time[chain * time_stride]);
}

// a * b, which is not contracted with what it is added to.
template <class V>
static inline V product(V a, V b) {
    return in_register(a * b);
}

// to += factor * (time * scale) * by, every operation rounded as torch rounds it.
static void add_product(int64_t dim, T* to, T factor, T time, const T* scale, const T* by) {
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes)
        store(load(to + i) + product(factor * (time * load(scale + i)), load(by + i)), to + i);
    for (; i < dim; ++i) to[i] += product(factor * (time * scale[i]), by[i]);
}

// One chain on its way: to the last bit what bnnflow/dynamics.py does with the same gradient.
class Traveller {
  public:
    Traveller(Worker& worker, const Dynamics& d) : worker(worker), c(worker.c), d(d), dim(worker.p.dim), memory(3 * dim), ones(dim, 1) {}

    void run(int64_t chain) {
        at = chain;
        theta = d.theta + at * dim, velocity = d.velocity + at * dim, grad = c.grad + at * dim;
        scale = d.scale + at * d.scale_stride;
        const double *kicks = d.kick + at * d.kick_stride, *drifts = d.drift + at * d.drift_stride;
        T *start = memory.data() + dim, *start_grad = start + dim;
        for (int64_t step = 0; step < d.steps; ++step) {
            const double value = c.value[at];
            std::copy(theta, theta + dim, start);
            std::copy(grad, grad + dim, start_grad);
            double kinetic = kick(kicks[0]);
            for (int64_t i = 0; i < d.drifts; ++i) {
                if (drifts[i] != 0) {
                    drift(drifts[i]);
                    worker.run(at);
                }
                kinetic += kick(kicks[i + 1]);
            }
            const double error = kinetic - (c.value[at] - value);
            if (d.microcanonical) d.error[step * c.chains + at] = error;
            if (!d.keys) continue;
            const bool lost = !(std::abs(error) < kLost);  // NaN counts
            if (lost) {
                c.value[at] = value;
                std::copy(start, start + dim, theta);
                std::copy(start_grad, start_grad + dim, grad);
            }
            refresh(d.keys[step], lost);
        }
    }

  private:
    static constexpr double kLost = 1000;  // nats

    double kick(double part) {
        if (part == 0) return 0;
        const T time = d.time[at * d.time_stride];
        if (!d.microcanonical) {
            add_product(dim, velocity, T(part), time, scale, grad);
            return 0;
        }
        T* scaled = memory.data();
        for (int64_t i = 0; i < dim; ++i) scaled[i] = scale[i] * grad[i];
        return turn(dim, velocity, scaled, T(part) * time);
    }

    void drift(double part) { add_product(dim, theta, T(part), d.time[at * d.time_stride], scale, velocity); }

    // Add a share of a random direction, or take it alone.
    void refresh(uint64_t key, bool alone) {
        T* anew = memory.data();
        normals(key, at * dim, dim, anew);
        normalise(dim, anew);
        if (alone) {
            std::copy(anew, anew + dim, velocity);
            return;
        }
        add_product(dim, velocity, T(d.share), 1, anew, ones.data());
        normalise(dim, velocity);
    }

    Worker& worker;
    const Call& c;
    const Dynamics& d;
    const int64_t dim;
    std::vector<T> memory, ones;
    int64_t at = 0;
    T *theta = nullptr, *velocity = nullptr, *grad = nullptr;
    const T* scale = nullptr;
};

// ---------------------------------------------------------------- assignment

typedef double Wide __attribute__((vector_size(kBytes)));
typedef int64_t Places __attribute__((vector_size(kBytes)));
constexpr int kWide = kBytes / sizeof(double);

// Assignment problems of n rows and n columns by shortest augmenting paths (Jonker and Volgenant 1987), their columns
// side by side in vectors; those past the end cost infinitely much.
class Assignment {
  public:
    explicit Assignment(int64_t n)
        : n(n), width(divide_up(n, kWide)), cost(n * width), price(width), length(width), taken(width), before(width),
          column_of(n), row_of(n) {}

    // Find which columns (n,) of gain (n, n) have the largest sum; return whether all of it is finite.
    bool solve(const T* gain, int64_t* columns) {
        bool finite = true;
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < width * kWide; ++j) {
                at(cost, i * width * kWide + j) = j < n ? -double(gain[i * n + j]) : INFINITY;
                finite = finite && (j >= n || std::isfinite(gain[i * n + j]));
            }
        if (!finite) return false;
        start();
        for (int64_t i = 0; i < n; ++i)
            if (column_of[i] < 0) augment(i);
        std::copy(column_of.begin(), column_of.end(), columns);
        return true;
    }

  private:
    const int64_t n, width;
    std::vector<Wide> cost, price, length, taken;  // taken: infinite where a column has a row
    std::vector<Places> before;                    // the row from which a column is reached
    std::vector<int64_t> column_of, row_of;        // -1: none
    std::vector<std::pair<int64_t, double>> scanned;

    static double& at(std::vector<Wide>& values, int64_t i) { return reinterpret_cast<double*>(values.data())[i]; }
    int64_t before_column(int64_t j) const { return before[j / kWide][j % kWide]; }

    void match(int64_t i, int64_t j) {
        column_of[i] = j;
        row_of[j] = i;
        at(taken, j) = INFINITY;
    }

    // Price each column by its cheapest row, which takes it unless it has one.
    void start() {
        std::copy(cost.begin(), cost.begin() + width, price.begin());
        std::fill(before.begin(), before.end(), Places{});
        for (int64_t i = 1; i < n; ++i)
            for (int64_t k = 0; k < width; ++k) {
                const Wide here = cost[i * width + k];
                const auto less = here < price[k];
                before[k] = less ? i - Places{} : before[k];
                price[k] = less ? here : price[k];
            }
        for (int64_t j = n; j < width * kWide; ++j) at(price, j) = 0;
        std::fill(taken.begin(), taken.end(), Wide{});
        std::fill(column_of.begin(), column_of.end(), -1);
        std::fill(row_of.begin(), row_of.end(), -1);
        for (int64_t j = n; j-- > 0;)
            if (column_of[before_column(j)] < 0) match(before_column(j), j);
    }

    // Find the shortest path from a row without a column to a column without a row, and exchange along it.
    void augment(int64_t from) {
        std::fill(length.begin(), length.end(), INFINITY - Wide{});
        scanned.clear();
        double base = 0;
        int64_t end = -1;
        for (int64_t i = from;;) {
            Wide least = INFINITY - Wide{}, least_free = least;
            Places where{}, where_free{};
            for (int64_t k = 0; k < width; ++k) {
                const Wide through = base + (cost[i * width + k] - price[k]);
                const auto shorter = through < length[k];  // never where it is NaN: scanned
                length[k] = shorter ? through : length[k];
                before[k] = shorter ? i - Places{} : before[k];
                const Wide free = length[k] + taken[k];
                const auto less = length[k] < least, less_free = free < least_free;
                least = less ? length[k] : least;
                where = less ? k - Places{} : where;
                least_free = less_free ? free : least_free;
                where_free = less_free ? k - Places{} : where_free;
            }
            int lane = 0, lane_free = 0;
            for (int l = 1; l < kWide; ++l) {
                lane = least[l] < least[lane] ? l : lane;
                lane_free = least_free[l] < least_free[lane_free] ? l : lane_free;
            }
            if (least_free[lane_free] <= least[lane]) {
                end = where_free[lane_free] * kWide + lane_free;
                base = least_free[lane_free];
                break;
            }
            const int64_t j = where[lane] * kWide + lane;
            scanned.emplace_back(j, least[lane]);
            at(length, j) = NAN;
            i = row_of[j];
            base = least[lane] - (at(cost, i * width * kWide + j) - at(price, j));
        }
        for (auto [j, reached] : scanned) at(price, j) += reached - base;
        for (int64_t j = end; j >= 0;) {
            const int64_t i = before_column(j), next = column_of[i];
            match(i, j);
            j = next;
        }
    }
};

// Solve problems (batch, n, n): which column each row gets, (batch, n), for the largest sum of gains. Return 0, 1 for a
// gain that is not finite, or 2 for want of memory.
extern "C" int bnnflow_assign(int64_t batch, int64_t n, const T* gain, int64_t* columns) try {
    Assignment problem(n);
    for (int64_t b = 0; b < batch; ++b)
        if (!problem.solve(gain + b * n * n, columns + b * n)) return 1;
    return 0;
} catch (const std::bad_alloc&) {
    return 2;
}

// ---------------------------------------------------------------- evaluation

// Evaluate all chains where they are, or let them follow dynamics if there are any. Return 0, 1 for a row that does not
// exist, or 2 for want of memory.
extern "C" int bnnflow_evaluate(const Problem* problem, const Call* call, const Dynamics* dynamics) try {
    const Problem& p = *problem;
    Call c = *call;
    std::vector<int64_t> drawn(c.drawn ? c.chains * c.n : 0);
    if (c.drawn) {
        bnnflow_rows(c.key, c.chains, c.n, c.n_data, drawn.data());
        c.rows = drawn.data();
        c.rows_stride = c.n;
    } else if (c.rows) {
        for (int64_t chain = 0; chain < (c.rows_stride ? c.chains : 1); ++chain)
            for (int64_t i = 0; i < c.n; ++i)
                if (uint64_t(c.rows[chain * c.rows_stride + i]) >= uint64_t(c.n_data)) return 1;
    }
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
        const int64_t first = c.chains * worker / workers, end = c.chains * (worker + 1) / workers;
        if (!dynamics) {
            for (int64_t chain = first; chain < end; ++chain) one.run(chain);
            return;
        }
        Traveller traveller(one, *dynamics);
        for (int64_t chain = first; chain < end; ++chain) traveller.run(chain);
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
