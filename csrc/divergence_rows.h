// The row kernel of the divergences. Rows are taken in blocks (csrc/divergence_blocks.h). Logarithms are in base 2
// throughout: with c = scale·log2(e)/temperature and u, v the c·logits of sides x and y relative to a reference near the
// largest so far, one pass gathers
//
//     X = Σ 2^u,  Y = Σ 2^v,  G = Σ 2^u·(u − v)        KL(x‖y) = G/X − log2 X + log2 Y, in bits
//
// and a second, whose reads come from the cache, writes the gradient of the student's logits s (teacher t):
//
//     reverse KL (x = s)   q·(u − v − G/X)            forward KL (x = t)   q − p
//
// Mixtures take a pass more in between: Σφ and Σw of the family's definition (effopd_kernels/divergence/reference.py).
// Sums run in fp32 within a block and in fp64 across blocks.
//
// Infinities: the fp32 sum G over a block holding −inf comes out NaN or inf, and only then is the block taken again
// with the comparisons that −inf needs. `hole` = Σ 2^u over entries with v = −inf, whose log-probability counts as
// kFloor.

// ---- first pass

struct Sums {  // relative to the references x0, y0
    double x = 0, y = 0, gap = 0, hole = 0, xu = 0, yv = 0;
    float cx = 0, cy = 0, x0 = 0, y0 = 0;
    bool holes = false;  // −inf met: the gradient pass must look out for it
    bool agree = false;  // the largest logits of both sides stand in one place
};

struct Part {  // what one block adds
    double x, y, gap, hole, xu, yv;
};

template <int dtype, bool holes, bool stats>
static Part part_of(const Sums& s, const char* x, const char* y, int count) {
    constexpr int size = size_of(dtype);
    vf X{}, Y{}, gap{}, hole{}, xu{}, yv{};
    for (int i = 0; i < count; i += kStep) {
        const Two zx = load_two(x + i * size, dtype), zy = load_two(y + i * size, dtype);
        vf z[4] = {at(zx.x[0], s.cx, s.x0), at(zy.x[0], s.cy, s.y0), at(zx.x[1], s.cx, s.x0), at(zy.x[1], s.cy, s.y0)},
           e[4];
        fetch_ahead(x + i * size, kStep * size), fetch_ahead(y + i * size, kStep * size);
        for (vf& u : z) u = below_overflow(u);  // the reference may lie far below this block
        exp2_(z, e);
        for (int k = 0; k < 4; k += 2) {
            vf u = z[k], v = z[k + 1];
            const vf eu = e[k], ev = e[k + 1];
            if (holes) {
                hole += v == -kInf ? eu : vf{};
                u = u == -kInf ? vf{} : u;
                v = v == -kInf ? vf{} : v;
            }
            X += eu;
            Y += ev;
            gap += eu * (u - v);
            if (stats) {
                xu += eu * u;
                yv += ev * v;
            }
        }
    }
    return {sum(X), sum(Y), sum(gap), holes ? sum(hole) : 0, stats ? sum(xu) : 0, stats ? sum(yv) : 0};
}

template <bool holes>
static Part part_of(const Sums& s, const Block& x, const Block& y, int count, bool stats) {
    if (x.dtype == kFloat32)
        return stats ? part_of<kFloat32, holes, true>(s, x.z, y.z, count)
                     : part_of<kFloat32, holes, false>(s, x.z, y.z, count);
    return stats ? part_of<kBFloat16, holes, true>(s, x.z, y.z, count)
                 : part_of<kBFloat16, holes, false>(s, x.z, y.z, count);
}

// What is left of a sum that lies too far below. Those of logits as far down as 1e10 may have overflowed, by the rounding
// of their reference; NaN are what a logit was.
static double vanished(double sum) { return sum != sum ? sum : 0; }

static void rebase(Sums& s, float x0, float y0) {
    const double dx = double(s.x0) - x0, dy = double(s.y0) - y0;
    // Before the first finite logit the reference is 0, and the step from it may be up, and huge.
    const double fx = s.x == 0 ? 0 : std::exp2(dx), fy = s.y == 0 ? 0 : std::exp2(dy);
    if (fx == 0) {
        s.gap = s.xu = s.hole = 0;
        s.x = vanished(s.x);
    } else {
        s.gap = fx * (s.gap + dx * s.x - dy * (s.x - s.hole));
        s.xu = fx * (s.xu + dx * s.x);
        s.x *= fx;
        s.hole *= fx;
    }
    s.yv = fy == 0 ? 0 : fy * (s.yv + dy * s.y);
    s.y = fy == 0 ? vanished(s.y) : fy * s.y;
    s.x0 = x0;
    s.y0 = y0;
}

// Until a side has met a finite logit its reference stays 0, so that −inf − reference is −inf and not NaN.
static float reference(double sum, float old, float top) {
    return top == -kInf || (sum != 0 && top <= old) ? old : top;
}

static void meet_tops(Sums& s, const Block& x, const Block& y, int count) {
    rebase(s, reference(s.x, s.x0, top_of(x, count) * s.cx), reference(s.y, s.y0, top_of(y, count) * s.cy));
}

struct Argmax {
    float top = -kInf;
    int64_t index = 0;
    void add(const Block& block, int64_t start, int count) {
        const float block_top = top_of(block, count);
        if (!(block_top > top)) return;
        top = block_top;
        index = start + first_of(block, top);
    }
};

static Sums online(const Side& side_x, const Side& side_y, const char* row_x, const char* row_y, int64_t V,
                   bool stats) {
    // A reference may lag behind the largest logit as long as u stays small: its rounding is u·2⁻²⁴. No entry exceeds
    // the sum, so this bounds u by 11.
    constexpr float kLag = 2 * kBlock;
    alignas(64) float x_block[kBlock], y_block[kBlock];
    const bool as_it_lies = as_they_lie(side_x, side_y);
    Sums s;
    Argmax x_best, y_best;
    s.cx = side_x.c;
    s.cy = side_y.c;
    for (int64_t start = 0; start < V; start += kBlock) {
        const int count = int(V - start < kBlock ? V - start : kBlock), padded = whole_steps(count);
        const Block x = block_of(side_x, row_x, start, count, x_block, as_it_lies);
        const Block y = block_of(side_y, row_y, start, count, y_block, as_it_lies);
        if (stats) x_best.add(x, start, padded), y_best.add(y, start, padded);
        if (s.x == 0 || s.y == 0) meet_tops(s, x, y, padded);
        Part part = part_of<false>(s, x, y, padded, stats);
        if (!(part.x + part.y <= kLag)) {
            meet_tops(s, x, y, padded);
            part = part_of<false>(s, x, y, padded, stats);
        }
        if (!(part.gap - part.gap == 0)) {  // −inf (or NaN) has no place in the fast form
            s.holes = true;
            part = part_of<true>(s, x, y, padded, stats);
        }
        s.x += part.x;
        s.y += part.y;
        s.gap += part.gap;
        s.hole += part.hole;
        s.xu += part.xu;
        s.yv += part.yv;
    }
    s.agree = x_best.index == y_best.index;
    return s;
}

// ---- last pass: the gradient of one block into g

struct Factors {
    float x, y;         // of 2^u and of 2^v
    float mean, floor;  // of u − v; what stands for a v of −inf
};

// Reverse KL, x = student, y = teacher: q·(u − v − mean). Forward KL, x = teacher, y = student: q − p. Writes the
// blocks' dtype. Sums and factors are copies: what g is written to might, for all the compiler knows, be theirs.
template <Kind kind, int dtype, bool holes>
static void gradient_as(const char* x, const char* y, char* g, int count, Sums s, Factors f, bool stream) {
    constexpr int size = size_of(dtype);
    const float offset = f.mean * f.x;
    for (int i = 0; i < count; i += kStep) {
        const Two zx = load_two(x + i * size, dtype), zy = load_two(y + i * size, dtype);
        vf u[2] = {at(zx.x[0], s.cx, s.x0), at(zx.x[1], s.cx, s.x0)}, eu[2];
        exp2_(u, eu);
        Two out;
        for (int k = 0; k < 2; ++k) {
            vf v = at(zy.x[k], s.cy, s.y0);
            if (holes) {
                u[k] = u[k] == -kInf ? vf{} : u[k];
                v = v == -kInf ? splat(f.floor) : v;
            }
            out.x[k] = kind == kForward ? exp2_(v) * f.y - eu[k] * f.x : eu[k] * ((u[k] - v) * f.x - offset);
        }
        store_gradient(g + i * size, out, dtype, stream);
    }
}

template <int dtype>
static auto gradient_of(Kind kind, bool holes) {
    return kind == kForward ? gradient_as<kForward, dtype, false>
           : holes          ? gradient_as<kReverse, dtype, true>
                            : gradient_as<kReverse, dtype, false>;
}

struct Mixture {  // x = student, y = teacher
    float a, b, pi, rho, kappa, cx, cy, x0, y0, log_x, log_y;
};

INLINE vf log_prob(const float* z, int i, float c, float top, float log_sum) {
    const vf l = at(z, i, c, top) - log_sum;
    return l == -kInf ? splat(kFloor) : l;
}

// φ (in bits) and w of K vectors. With e = 2^(−|lp − lq|) every quotient is of numbers in [0, 1], and none is 0/0; what
// vanishes with lp − lq is taken from 1 − e, as in the definition.
template <int K>
INLINE void mixture_of(const Mixture& m, const float* x, const float* y, float* w, vf& phis, vf& ws) {
    vf lq[K], lp[K], q[K], p[K], d[K], minus[K], e[K], less[K], t[K], density[K], l[K];
    vi teacher_larger[K];
    EACH lq[k] = log_prob(x, k * kLanes, m.cx, m.x0, m.log_x);
    EACH lp[k] = log_prob(y, k * kLanes, m.cy, m.y0, m.log_y);
    EACH d[k] = lp[k] - lq[k];
    EACH minus[k] = from_bits(bits(d[k]) | (vi)splat(-0.0f));
    EACH teacher_larger[k] = d[k] > 0;
    exp2_(lq, q);
    exp2_(lp, p);
    exp2_(minus, e);
    exp2m1(minus, e, less);  // the smaller of p and q over the larger, minus 1
    EACH t[k] = (teacher_larger[k] ? splat(m.rho) : splat(m.pi)) * less[k];
    EACH density[k] = (teacher_larger[k] ? m.pi + m.rho * e[k] : m.rho + m.pi * e[k]);  // m over the larger
    log2_(density, l);
    EACH l[k] += (t[k] - (density[k] - 1.0f)) * 1.4426950409f;  // what rounding took from 1 + t is put back
    for (int k = 0; k < K; ++k) {
        const vf lq_lm = teacher_larger[k] ? -d[k] - l[k] : -l[k], lp_lm = teacher_larger[k] ? -l[k] : d[k] - l[k];
        const vf share = (teacher_larger[k] ? m.rho * e[k] : splat(m.rho)) / density[k];
        const vf k_difference = m.kappa * ((teacher_larger[k] ? -p[k] : q[k]) * less[k]), b_term = m.b * q[k] * lq_lm;
        const vf wi = b_term * float(kLn2) - share * k_difference;
        *(vf*)(w + k * kLanes) = wi;
        phis += m.a * p[k] * lp_lm + (b_term - k_difference * float(kLog2e));
        ws += wi;
    }
}

// One block, all of whose arrays are padded to a multiple of kStep.
INLINE void mixture_block(const Mixture& m, const float* x, const float* y, float* w, int count, double& phi_sum,
                          double& w_sum) {
    vf phis{}, ws{};
    int i = 0;
    for (; i + 2 * kStep <= count; i += 2 * kStep) mixture_of<4>(m, x + i, y + i, w + i, phis, ws);
    for (; i < count; i += kStep) mixture_of<2>(m, x + i, y + i, w + i, phis, ws);
    phi_sum += sum(phis);
    w_sum += sum(ws);
}

INLINE void mixture_gradient(const Mixture& m, const float* x, const float* w, float* g, int count, float w_sum,
                             float factor) {
    constexpr int K = 2;
    for (int i = 0; i < count; i += kStep) {
        vf lq[K], q[K];
        EACH lq[k] = log_prob(x, i + k * kLanes, m.cx, m.x0, m.log_x);
        exp2_(lq, q);
        for (int k = 0; k < K; ++k)
            *(vf*)(g + i + k * kLanes) = (*(const vf*)(w + i + k * kLanes) - q[k] * w_sum) * factor;
    }
}

#undef EACH

// Chain rule through the soft cap: d tanh(x)/dx = 1 − tanh².
INLINE void through_cap(const float* tanh, float* g, int count) {
    for (int i = 0; i < count; i += kLanes) *(vf*)(g + i) *= 1.0f - *(const vf*)(tanh + i) * *(const vf*)(tanh + i);
}

// ---- a row

// Logits before the first whole line of what is streamed, as streams write whole lines.
static int64_t head_of(const char* out, bool stream, int64_t size) {
    return stream ? (64 - uintptr_t(out) % 64) % 64 / size : 0;
}

static void one_row(const Job& job, int64_t n, float* scratch) {
    const Side &student = job.student, &teacher = job.teacher;
    const char *row_s = student.row(n, job.T), *row_t = teacher.row(n, job.T);
    char* row_g = job.grad.data ? job.grad.row(n, job.T) : nullptr;
    const int64_t V = job.V, size = size_of(student.dtype);
    if (job.mask && !job.mask[n]) {
        job.loss[n] = 0;
        if (job.stats) job.stats[n] = job.stats[n + job.N] = job.stats[n + 2 * job.N] = 0;
        if (row_g) memset(row_g, 0, job.columns * size);
        return;
    }
    const bool forward = job.kind == kForward;
    const Sums s = forward ? online(teacher, student, row_t, row_s, V, job.stats)
                           : online(student, teacher, row_s, row_t, V, job.stats);
    const double log_x = std::log2(s.x), log_y = std::log2(s.y), floor = kFloor + log_y;
    const double mean = (s.gap - s.hole * floor) / s.x;
    double loss = mean - log_x + log_y, w_sum = 0;

    alignas(64) float x_block[kBlock], y_block[kBlock], g[kBlock];
    const Mixture m{job.a, job.b, job.pi, job.rho, job.kappa, s.cx, s.cy, s.x0, s.y0, float(log_x), float(log_y)};
    if (job.kind == kMixture) {
        loss = 0;
        for (int64_t start = 0; start < V; start += kBlock) {
            const int count = int(V - start < kBlock ? V - start : kBlock);
            const float* x = stage(student, row_s, start, count, x_block);
            const float* y = stage(teacher, row_t, start, count, y_block);
            mixture_block(m, x, y, row_g ? scratch + start : g, count, loss, w_sum);
        }
    } else {
        loss *= forward ? job.a : job.b;
    }
    job.loss[n] = float(loss * kLn2);
    if (job.stats) {
        const double entropy_x = (log_x - s.xu / s.x) * kLn2, entropy_y = (log_y - s.yv / s.y) * kLn2;
        job.stats[n] = float(forward ? entropy_y : entropy_x);
        job.stats[n + job.N] = float(forward ? entropy_x : entropy_y);
        job.stats[n + 2 * job.N] = s.agree;
    }
    if (!row_g) return;

    const double factor = job.chain * (job.row_scale ? job.row_scale[n] : 1.0);
    const Factors f = forward ? Factors{float(job.a * factor / s.x), float(job.a * factor / s.y), 0, 0}
                              : Factors{float(job.b * kLn2 * factor / s.x), 0, float(mean), float(floor)};
    const bool as_it_lies = job.kind != kMixture && as_they_lie(student, teacher);
    const int64_t head = head_of(row_g, job.stream && job.kind != kMixture, size);
    for (int64_t start = 0, limit = head ? head : kBlock; start < V; start += limit, limit = kBlock) {
        const int count = int(V - start < limit ? V - start : limit), padded = whole_steps(count);
        char* const out = row_g + start * size;
        if (job.kind == kMixture) {
            const float* x = stage(student, row_s, start, count, x_block);
            mixture_gradient(m, x, scratch + start, g, count, float(w_sum), float(factor));
            if (student.pre != 0) through_cap(x, g, count);
        } else {
            const Block s_block = block_of(student, row_s, start, count, x_block, as_it_lies);
            const Block t_block = block_of(teacher, row_t, start, count, y_block, as_it_lies);
            const Block &x = forward ? t_block : s_block, &y = forward ? s_block : t_block;
            const bool direct = as_it_lies && padded == count && (kStreams || !job.stream);
            const auto run = (x.dtype == kFloat32 ? gradient_of<kFloat32> : gradient_of<kBFloat16>)(job.kind, s.holes);
            run(x.z, y.z, direct ? out : (char*)g, padded, s, f, direct && job.stream);
            if (direct) continue;
            if (x.dtype == kBFloat16) {
                copy_out(out, g, int64_t(count) * size, job.stream);
                continue;
            }
            if (student.pre != 0) through_cap((const float*)s_block.z, g, count);
        }
        store(g, count, student.dtype, out, job.stream);
    }
    memset(row_g + V * size, 0, (job.columns - V) * size);
}

// row(n) for rows drawn `job.grain` at a time from `next`.
template <class Row>
static void each_row(const Job& job, std::atomic<int64_t>& next, Row row) {
    for (int64_t begin; (begin = next.fetch_add(job.grain)) < job.N;)
        for (int64_t n = begin; n < job.N && n < begin + job.grain; ++n) row(n);
    end_stream();
}

// One thread's work. scratch (V rounded up to whole blocks) is for mixtures.
static void run_rows(const Job& job, std::atomic<int64_t>& next, float* scratch) {
    each_row(job, next, [&](int64_t n) { one_row(job, n, scratch); });
}
