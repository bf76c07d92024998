// Calls every kernel from several threads at once, for builds under a sanitizer (test_sanitizers.py), or once, for builds for
// another processor (test_arm.py).
//
// One of the calls has the pool of threads, the others compute alone. Memory is allocated to the byte, so that AddressSanitizer sees
// what passes an end.
#include "kernels.cpp"

#include <cstdio>
#include <deque>
#include <memory>
#include <random>
#include <thread>
#include <vector>

// Random numbers that live as long as the program.
struct Memory {
    std::mt19937 random{7};
    std::deque<std::unique_ptr<float[]>> floats;
    std::deque<std::unique_ptr<uint8_t[]>> bytes;

    float* real(int64_t count, float low, float high) {
        floats.emplace_back(new float[count]);
        for (int64_t i = 0; i < count; i++) floats.back()[i] = std::uniform_real_distribution<float>(low, high)(random);
        return floats.back().get();
    }
    uint8_t* small(int64_t count, int low, int high) {
        bytes.emplace_back(new uint8_t[count]);
        for (int64_t i = 0; i < count; i++) bytes.back()[i] = uint8_t(std::uniform_int_distribution<int>(low, high)(random));
        return bytes.back().get();
    }
    // Numbers of 16 bits are the upper halves of those of 32.
    uint8_t* floating(int64_t count, int64_t bits) {
        const float* from = real(count, -0.1f, 0.1f);
        uint8_t* to = small(count * bits / 8, 0, 0);
        for (int64_t i = 0; i < count; i++) memcpy(to + i * bits / 8, reinterpret_cast<const uint8_t*>(from + i) + 4 - bits / 8, bits / 8);
        return to;
    }
    // As quantize.py packs a matrix; not its numbers.
    Linear linear(int64_t inputs, int64_t outputs, int64_t bits, bool bias, bool by_group) {
        const int64_t step = bits >= 16 ? kStep : kGroup;
        Linear w{nullptr, nullptr, nullptr, (inputs + step - 1) / step * step, outputs, bits, by_group};
        const int64_t channels = w.panels() * kLanes;
        w.weight = w.is_float() ? floating(channels * w.depth, bits) : small(w.panels() * w.panel_bytes(), 0, 255);
        w.scale = real(channels, 1e-4f, 2e-3f);
        if (bias) w.bias = real(channels, -0.1f, 0.1f);
        return w;
    }
    // In a model of 4 bits, what adds to the hidden states has 8.
    GatedLinear gated(int64_t inputs, int64_t outputs, int64_t bits, int64_t rank, bool bias, bool adds) {
        const bool by_group = bits == 4;
        GatedLinear w{linear(inputs, outputs, adds && by_group ? 8 : bits, bias, by_group), {}, {}};
        const int64_t beside = bits >= 16 ? 32 : 8;
        if (rank) w.in = linear(inputs, rank, beside, false, by_group), w.out = linear(rank, outputs, beside, false, by_group);
        return w;
    }
    Experts experts(int64_t hidden, const Routing& r, int64_t bits) {
        const auto padded = [](int64_t outputs) { return (outputs + kLanes - 1) / kLanes * kLanes; };
        return {linear(hidden, r.experts, bits == 16 ? 16 : 32, false, false), real(r.experts, -0.1f, 0.1f),
                linear(hidden, r.experts * padded(2 * r.size), bits, false, false),
                linear(r.size, r.experts * padded(hidden), bits, false, false)};
    }
};

// With experts, of all layers but the first; `shared` is the width of the expert that all rows pass, or 0.
struct Shape {
    int64_t hidden, heads, kv_heads, head_dim, ffn, mixed, rank, vocab, bits;
    bool norms, bias;
    Routing routing;
    int64_t shared;
    int64_t lora;  // rank of an adapter that some rows have, or 0
};
constexpr int64_t kLayers = 2, kSlots = 1200;

// What one thread gives: hidden states, keys and values, logits, tokens, probabilities, and how many experts a layer has touched.
struct Result {
    std::vector<float> hidden, cache, logits, probabilities;
    std::vector<int64_t> tokens, touched;

    bool operator==(const Result& o) const {
        return hidden == o.hidden && cache == o.cache && logits == o.logits && probabilities == o.probabilities && tokens == o.tokens &&
               touched == o.touched;
    }
};

// Scratch memory to the byte, at the alignment that the kernels are given.
struct Scratch {
    std::vector<std::unique_ptr<char[], void (*)(void*)>> pieces;

    char* take(int64_t size) {
        pieces.emplace_back(static_cast<char*>(std::aligned_alloc(64, size)), [](void* p) { std::free(p); });
        return pieces.back().get();
    }
};

static Result call(const Model& m, const Linear& head, const LoraLayer* lora, int threads, unsigned seed) {
    std::mt19937 random{seed};
    std::uniform_real_distribution<float> unit(-1, 1);
    auto filled = [&](int64_t count) {
        std::vector<float> out(count);
        for (float& x : out) x = unit(random);
        out.shrink_to_fit();
        return out;
    };
    Result result;
    result.cache = filled(kLayers * 2 * m.kv_heads * kSlots * m.head_dim);
    // A prompt, then its causal and its noisy part beside another sequence.
    std::vector<int64_t> one(41), two(19), three(1100);
    for (size_t i = 0; i < one.size(); i++) one[i] = int64_t(kSlots - 1 - i);
    for (size_t i = 0; i < two.size(); i++) two[i] = int64_t(2 * i);
    for (size_t i = 0; i < three.size(); i++) three[i] = int64_t(40 + i);  // so many that threads share them
    const std::vector<std::vector<Segment>> steps = {
        {{0, 33, 0, 4, 0, one.data()}, {33, 44, 0, 1, 0, two.data()}},
        {{0, 2, 1098, 1, 0, three.data()}},
        {{0, 3, 33, 1, 0, one.data()}, {3, 8, 36, 8, 1, one.data()}, {8, 16, 11, 8, 1, two.data()}},
    };
    Scratch scratch;
    result.touched.resize(m.num_layers);
    for (const std::vector<Segment>& segments : steps) {
        const int64_t rows = segments.back().stop;
        const std::vector<float> cos = filled(rows * m.rotary_dim), sin = filled(rows * m.rotary_dim);
        result.hidden = filled(rows * m.hidden);
        const LoraRun runs[] = {{1, rows / 2, lora}, {rows / 2, rows / 2 + 1, lora}};
        const ForwardBatch batch{rows, int64_t(segments.size()), segments.data(), cos.data(), sin.data(), result.hidden.data(),
                                 {result.cache.data(), kSlots}, result.touched.data(), lora ? 2 : 0, runs};
        unmask_forward(&m, &batch, scratch.take(unmask_forward_bytes(&m, rows, threads)), threads);
    }
    const int64_t rows = int64_t(result.hidden.size()) / m.hidden;
    result.logits.resize(rows * head.outputs), result.tokens.resize(rows), result.probabilities.resize(rows);
    const int64_t size = unmask_linear_bytes(&head, rows, threads);
    unmask_linear(&head, result.hidden.data(), rows, m.hidden, result.logits.data(), scratch.take(size), threads);
    unmask_greedy(&head, result.hidden.data(), rows, m.hidden, 5, result.tokens.data(), result.probabilities.data(),
                  scratch.take(size), threads);
    return result;
}

// A random model and its vocabulary head.
struct Case {
    Memory memory;
    std::vector<Layer> layers;
    std::deque<Experts> experts;
    std::vector<LoraLayer> lora;
    Model model;
    Linear head;

    explicit Case(const Shape& s) {
        const int64_t qkv = (s.heads + 2 * s.kv_heads) * s.head_dim, attended = s.heads * s.head_dim;
        auto norm = [&](int64_t size) { return memory.real(size, 0.5f, 1.5f); };
        for (int64_t i = 0; i < kLayers; i++) {
            Layer l{};
            l.qkv = memory.gated(s.hidden, qkv, s.bits, s.rank, s.bias, false);
            l.out = memory.gated(attended, s.hidden, s.bits, s.rank, s.bias, true);
            const bool is_routed = s.routing.experts && i > 0;
            l.ffn = is_routed ? s.shared : s.ffn, l.mixed = is_routed && !s.shared ? 1 : s.mixed;
            if (is_routed) l.experts = &experts.emplace_back(memory.experts(s.hidden, s.routing, s.bits));
            if (l.ffn) {
                l.gate_up = memory.gated(s.hidden, 2 * l.ffn, s.bits, s.rank, s.bias, false);
                l.down = memory.gated(l.ffn, s.hidden, s.bits, s.rank, s.bias, true);
            }
            l.attention_norm = norm(s.hidden), l.mlp_norm = norm(s.hidden);
            if (s.norms) l.query_norm = norm(s.head_dim), l.key_norm = norm(s.head_dim);
            layers.push_back(l);
            if (!s.lora) continue;
            auto update = [&](int64_t inputs, int64_t outputs) {
                return LoraUpdate{memory.linear(inputs, s.lora, 32, false, false), memory.linear(s.lora, outputs, 16, false, false)};
            };
            lora.push_back({{update(s.hidden, qkv), update(attended, s.hidden)}});
            if (!l.ffn) continue;
            lora.back().updates[kGateUp] = update(s.hidden, 2 * l.ffn), lora.back().updates[kDown] = update(l.ffn, s.hidden);
        }
        model = {layers.data(), norm(s.hidden), kLayers, s.hidden, s.heads, s.kv_heads, s.head_dim, s.head_dim, s.rank,
                 1e-6f, s.routing, s.lora};
        head = memory.linear(s.hidden, s.vocab, std::max<int64_t>(s.bits, 8), false, s.bits == 4);
    }

    const LoraLayer* adapter() const { return lora.empty() ? nullptr : lora.data(); }
};

// What depends on every bit of some numbers.
template <class T>
static void print_digest(const std::vector<T>& numbers) {
    uint64_t digest = 14695981039346656037u;
    for (size_t i = 0; i < numbers.size() * sizeof(T); i++)
        digest = (digest ^ reinterpret_cast<const unsigned char*>(numbers.data())[i]) * 1099511628211u;
    std::printf("%016llx\n", static_cast<unsigned long long>(digest));
}

// Forwards, and products of every number of rows that tiles treat in a way of its own.
static void print_digests(const Shape& s) {
    Case made(s);
    const Result result = call(made.model, made.head, made.adapter(), 1, 0);
    for (const std::vector<float>* numbers : {&result.hidden, &result.cache, &result.logits, &result.probabilities})
        print_digest(*numbers);
    print_digest(result.tokens);
    const Linear w = made.memory.linear(s.ffn, s.vocab, s.bits, true, false);
    for (int64_t rows = 1; rows <= 40; rows++) {
        Scratch scratch;
        std::vector<float> out(rows * w.outputs);
        const float* x = made.memory.real(rows * s.ffn, -1, 1);
        unmask_linear(&w, x, rows, s.ffn, out.data(), scratch.take(unmask_linear_bytes(&w, rows, 1)), 1);
        print_digest(out);
    }
}

// 0 if overlapping calls give what one thread gives.
static int check_threads(const Shape& s) {
    Case made(s);
    constexpr int kCallers = 4;
    std::vector<Result> expected, found(kCallers);
    for (int i = 0; i < kCallers; i++) expected.push_back(call(made.model, made.head, made.adapter(), 1, i));
    int wrong = 0;
    for (int threads = 1; threads <= 3; threads++) {
        std::vector<std::thread> callers;
        for (int i = 0; i < kCallers; i++)
            callers.emplace_back([&, i] { found[i] = call(made.model, made.head, made.adapter(), threads, i); });
        for (std::thread& caller : callers) caller.join();
        wrong += !(found == expected);
    }
    return wrong;
}

#if defined(UNMASK_AMX) && !defined(UNMASK_EMULATE)
#include <sys/syscall.h>
#include <unistd.h>

// Linux lends tiles to a process that asks for them (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
static bool ask_for_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#else
static bool ask_for_tiles() { return true; }
#endif

// Without arguments checks threads; with any prints digests of results, to compare with those of another build.
int main(int count, char**) {
    if (!ask_for_tiles()) return 2;
    const Shape shapes[] = {
        {64, 4, 2, 16, 96, 2, 0, 61, 8, false, false},    {64, 4, 2, 16, 96, 2, 0, 61, 4, true, false},
        {48, 3, 1, 10, 40, 1, 16, 1601, 8, true, true},  {48, 3, 3, 8, 128, 8, 8, 770, 4, false, true},
        {64, 4, 2, 16, 96, 1, 0, 61, 16, true, false},    {48, 3, 1, 10, 272, 1, 16, 1601, 32, false, true},
        {64, 4, 2, 16, 96, 2, 0, 61, 8, true, false, {8, 2, 4, 2, 1, 0, 32, 2, 2.5f}, 64},
        {48, 3, 1, 10, 40, 1, 0, 61, 4, true, false, {12, 3, 1, 1, 1, 0, 40, 1, 1.0f}, 0},
        {64, 4, 2, 16, 96, 1, 0, 61, 4, false, true, {8, 2, 1, 1, 0, 3, 24, 1, 2.5f}, 48},
        {48, 3, 1, 10, 40, 1, 0, 61, 16, true, false, {5, 5, 1, 1, 1, 0, 17, 1, 1.0f}, 34},
        {48, 3, 1, 10, 40, 1, 16, 61, 8, true, true, {}, 0, 21},
        {64, 4, 2, 16, 96, 2, 0, 61, 4, true, false, {8, 2, 4, 2, 1, 0, 32, 2, 2.5f}, 64, 48},
    };
    int wrong = 0;
    for (const Shape& shape : shapes) {
        if (count > 1) print_digests(shape);
        else wrong += check_threads(shape);
    }
    if (wrong) std::printf("%d of %zu rounds differ from one thread's\n", wrong, 3 * std::size(shapes));
    return wrong != 0;
}
