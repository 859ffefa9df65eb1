// Rows of whose teacher k entries are known by their ids: the vocabulary becomes k + 1 buckets, the last of which is all
// others together, and the divergence of those is the row kernel's (csrc/divergence_rows.h). Two passes over a row of
// logits, of which the second, the gradient's, reads it from the cache.
//
// The others are summed without the known ones, and not as what these leave of the whole, which cancels where they hold
// nearly everything: a block that holds known entries is copied, with −inf in their places.

// Which entries of a row are known, as a list for each block: in O(k), without sorting. The first block may be short, so
// that the others begin where the output's lines do.
class Known {
   public:
    Known(const int64_t* ids, int64_t k, int64_t V, int64_t first, int32_t* memory)
        : V(V), shift((kBlock - first) % kBlock), ids(ids), heads(memory), next(memory + blocks_of(V)) {
        memset(heads, 0xff, blocks_of(V) * sizeof *heads);  // −1: none
        for (int64_t j = 0; j < k; ++j) {
            if (ids[j] < 0) continue;  // no token
            int32_t& head = heads[(ids[j] + shift) / kBlock];
            next[j] = head;
            head = int32_t(j);
        }
    }

    // visit(start, count, j): j is the first known entry of `count` from `start`, −1 where there is none.
    template <class Visit>
    void each_block(Visit visit) const {
        for (int64_t block = 0, start = 0, stop; start < V; ++block, start = stop) {
            stop = (block + 1) * kBlock - shift;
            if (stop > V) stop = V;
            visit(start, int(stop - start), heads[block]);
        }
    }

    // put(i, j) for every known entry j of the block that starts at `start`; it is the block's entry i.
    template <class Put>
    void each(int64_t start, int32_t j, Put put) const {
        for (; j >= 0; j = next[j]) put(int(ids[j] - start), j);
    }

   private:
    const int64_t V, shift;
    const int64_t* const ids;
    int32_t *const heads, *const next;
};

// Σ 2^u of the others, u = c·z − reference, the reference near their largest, and 0 before any that is finite; where
// asked for, Σ 2^u·u, too.
struct Others {
    double sum = 0, weighted = 0;
    float reference = 0;

    double entropy() const { return sum == 0 ? 0 : (std::log2(sum) - weighted / sum) * kLn2; }  // of their own shares
};

template <int dtype, bool weighted>
static Others sums_of(const char* z, int count, float c, float reference) {
    vf sums[2]{}, products[2]{};
    for (int i = 0; i < count; i += kStep) {
        const Two two = load_two(z + i * size_of(dtype), dtype);
        fetch_ahead(z + i * size_of(dtype), kStep * size_of(dtype));
        const vf u[2] = {below_overflow(at(two.x[0], c, reference)), below_overflow(at(two.x[1], c, reference))};
        vf e[2];
        exp2_(u, e);
        for (int k = 0; k < 2; ++k) {
            sums[k] += e[k];
            if (weighted) products[k] += e[k] * (u[k] == -kInf ? vf{} : u[k]);
        }
    }
    return {sum(sums[0] + sums[1]), weighted ? sum(products[0] + products[1]) : 0};
}

template <bool weighted>
static Others sums_of(const Block& b, int count, float c, float reference) {
    return b.dtype == kFloat32 ? sums_of<kFloat32, weighted>(b.z, count, c, reference)
                               : sums_of<kBFloat16, weighted>(b.z, count, c, reference);
}

template <bool weighted>
static Others others_of(const Side& side, const char* row, const Known& known) {
    constexpr float kLag = kBlock;  // see `online`
    alignas(64) float copy[kBlock];
    const bool plain = as_they_lie(side, side);
    Others others;
    known.each_block([&](int64_t start, int count, int32_t j) {
        Block b = block_of(side, row, start, count, copy, plain && j < 0);
        if (j >= 0) {
            if (b.z != (const char*)copy) memcpy(copy, b.z, count * sizeof(float));
            known.each(start, j, [&](int i, int32_t) { copy[i] = -kInf; });
            b.z = (const char*)copy;
        }
        count = whole_steps(count);
        const auto meet_top = [&] {
            const float old = others.reference;
            others.reference = reference(others.sum, old, top_of(b, count) * side.c);
            if (others.sum == 0) return;
            const double step = double(old) - others.reference, factor = std::exp2(step);
            others.weighted = factor == 0 ? 0 : factor * (others.weighted + step * others.sum);
            others.sum = factor == 0 ? vanished(others.sum) : factor * others.sum;
        };
        if (others.sum == 0) meet_top();
        Others part = sums_of<weighted>(b, count, side.c, others.reference);
        if (!(part.sum <= kLag)) {
            meet_top();
            part = sums_of<weighted>(b, count, side.c, others.reference);
        }
        others.sum += part.sum;
        others.weighted += part.weighted;
    });
    return others;
}

struct Logit {
    double z;    // in bits
    float tanh;  // 0 without a soft cap
};

static Logit logit_at(const Side& side, const char* row, int64_t i) {
    uint32_t bits = 0;
    memcpy(&bits, row + i * size_of(side.dtype), size_of(side.dtype));
    if (side.dtype == kBFloat16) bits <<= 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    if (side.dtype == kFloat16) {
        alignas(64) uint16_t one[32] = {uint16_t(bits)};
        x = load((const char*)one, kFloat16)[0];
    }
    const float tanh = side.pre != 0 ? tanh_(splat(x * side.pre))[0] : 0;
    return {double(side.pre != 0 ? tanh : x) * side.c, tanh};
}

// Log-weights of row n's buckets, in nats and up to a shift.
static Others buckets_of(const TopkJob& job, int64_t n, const char* row, const Known& known) {
    const int64_t* const ids = job.ids + n * job.k;
    float* const out = job.buckets + n * (job.k + job.tail);
    const bool entropy = job.job.kind == kToken && job.job.stats;
    const Others others = !job.tail ? Others{}
                          : entropy ? others_of<true>(job.logits, row, known)
                                    : others_of<false>(job.logits, row, known);
    const double rest = others.reference + std::log2(others.sum);
    double top = rest;
    for (int64_t j = 0; j < job.k; ++j) {
        const double z = ids[j] < 0 ? -kInf : logit_at(job.logits, row, ids[j]).z;
        top = z > top ? z : top;
    }
    if (top == -kInf) top = 0;
    for (int64_t j = 0; j < job.k; ++j)
        out[j] = ids[j] < 0 ? -kInf : float((logit_at(job.logits, row, ids[j]).z - top) * kLn2);
    if (job.tail) out[job.k] = float((rest - top) * kLn2);
    return others;
}

// The log-probability of the one entry into the loss, and its gradient over the buckets. The entropy is that of the two
// outcomes, and the others' own as often as it is one of them: nothing cancels where one outcome has nearly everything.
static void one_token(const Job& job, float* buckets, int64_t n, const Others& others) {
    const double rest = double(buckets[1]) - buckets[0], share = 1 / (1 + std::exp(-rest));
    const auto log_share = [](double lead) {  // of what leads by so much
        return lead < 0 ? lead - std::log1p(std::exp(lead)) : -std::log1p(std::exp(-lead));
    };
    const double log_one = log_share(-rest), log_rest = log_share(rest);
    job.loss[n] = float(log_one);
    if (job.stats) {
        const auto part = [](double log_p) { return log_p == -kInf ? 0 : -std::exp(log_p) * log_p; };
        job.stats[n] = float(part(log_one) + part(log_rest) + share * others.entropy());
        job.stats[n + job.N] = job.stats[n + 2 * job.N] = 0;
    }
    buckets[0] = float(share * (job.row_scale ? job.row_scale[n] : 1));
    buckets[1] = -buckets[0];
}

template <int dtype>
static void exponentials(const char* z, char* g, int count, float c, float reference, float factor, bool stream) {
    for (int i = 0; i < count; i += kStep) {
        const Two two = load_two(z + i * size_of(dtype), dtype);
        const vf u[2] = {at(two.x[0], c, reference), at(two.x[1], c, reference)};
        vf e[2];
        exp2_(u, e);
        store_gradient(g + i * size_of(dtype), {{e[0] * factor, e[1] * factor}}, dtype, stream);
    }
}

// What a gradient over the buckets is over the logits: a bucket's own, times each one's share of it.
static void spread(const TopkJob& job, int64_t n, const char* row, char* out, const Known& known,
                   const Others& others) {
    const Side& side = job.logits;
    const float* const grads = job.buckets + n * (job.k + job.tail);
    const bool any = others.sum != 0;
    const float c = side.c, reference = others.reference;
    const float factor = any ? float(grads[job.k] * job.chain / others.sum) : 0;
    const bool plain = as_they_lie(side, side);
    alignas(64) float block[kBlock], g[kBlock];
    known.each_block([&](int64_t start, int count, int32_t j) {
        char* const to = out + start * size_of(side.dtype);
        if (any && j < 0 && plain && count % kStep == 0 && (kStreams || !job.stream)) {
            const char* const z = row + start * size_of(side.dtype);
            return side.dtype == kFloat32 ? exponentials<kFloat32>(z, to, count, c, reference, factor, job.stream)
                                          : exponentials<kBFloat16>(z, to, count, c, reference, factor, job.stream);
        }
        if (any) {
            const float* const z = stage(side, row, start, count, block);
            exponentials<kFloat32>((const char*)z, (char*)g, whole_steps(count), c, reference, factor, false);
            if (side.pre != 0) through_cap(z, g, count);
        } else {
            memset(g, 0, sizeof g);
        }
        known.each(start, j, [&](int i, int32_t entry) {
            const float tanh = side.pre != 0 ? logit_at(side, row, start + i).tanh : 0;
            g[i] = float(grads[entry] * job.chain) * (1 - tanh * tanh);
        });
        store(g, count, side.dtype, to, job.stream);
    });
}

static void one_topk_row(const TopkJob& job, int64_t n, float* scratch, int32_t* lists) {
    const int64_t size = size_of(job.logits.dtype);
    const char* const row = job.logits.row(n, job.T);
    char* const out = job.grad.data ? job.grad.row(n, job.T) : nullptr;
    if (job.job.mask && !job.job.mask[n]) {
        one_row(job.job, n, scratch);
        if (out) memset(out, 0, job.V * size);
        return;
    }
    const int64_t* const ids = job.ids + n * job.k;
    // By the same blocks whatever the output's address, so that a row's loss does not depend on its place.
    const Others others = buckets_of(job, n, row, Known(ids, job.k, job.V, 0, lists));
    if (job.job.kind == kToken) one_token(job.job, job.buckets + 2 * n, n, others);
    else one_row(job.job, n, scratch);
    if (!out) return;
    spread(job, n, row, out, Known(ids, job.k, job.V, head_of(out, job.stream, size), lists), others);
}

// One thread's work, as `run_rows`. lists: int32, for `Known`.
static void run_topk_rows(const TopkJob& job, std::atomic<int64_t>& next, float* scratch, int32_t* lists) {
    each_row(job.job, next, [&](int64_t n) { one_topk_row(job, n, scratch, lists); });
}
