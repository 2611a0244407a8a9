// Sequences in memory, and tiles of them: up to LANES channels by some tokens as dense fp32 rows, which all kernels
// compute on. Included once per instruction set, after simd.h.

// A tensor (b, d, l) or a tensor's view, with strides in elements.
template <class T>
struct Sequence {
    T *data;
    int64_t batch, channel, token;

    T *at(int64_t b, int64_t d, int64_t t) const { return data + b * batch + d * channel + t * token; }
    // The same elements with the last token first.
    Sequence reversed(int64_t length) const { return {data + (length - 1) * token, batch, channel, -token}; }
};

template <class T>
Sequence<T> sequence(Arguments &a) {
    T *data = a.pointer<T>();
    const int64_t batch = a.integer(), channel = a.integer();
    return {data, batch, channel, a.integer()};
}

// The order in which tokens are visited: from the first to the last or back; or, where they are the pixels of a picture
// of `height` rows, numbered row by row, column by column.
struct Route {
    int64_t length, height;  // height 1: not by columns
    bool reverse;

    // The number of the token that is visited at time t.
    int64_t token(int64_t t) const {
        const int64_t i = reverse ? length - 1 - t : t;
        return height == 1 ? i : i % height * (length / height) + i / height;
    }
    // Call body(first, token, step, count) for pieces of the times [start, start + count): those from start + first on
    // visit `count` tokens a step apart.
    template <class Body>
    void pieces(int64_t start, int64_t count, const Body &body) const {
        if (height == 1) return body(int64_t{0}, token(start), int64_t{reverse ? -1 : 1}, count);
        const int64_t width = length / height;
        for (int64_t done = 0; done < count;) {
            const int64_t row = token(start + done) / width, here = reverse ? row + 1 : height - row;
            const int64_t piece = here < count - done ? here : count - done;
            body(done, token(start + done), reverse ? -width : width, piece);
            done += piece;
        }
    }
};

// Rows of LANES numbers at a distance.
struct Rows {
    const float *data;
    int64_t step;
    Vec operator[](int64_t i) const { return load(data + i * step); }
};

// Copy `tokens` rows into a tile (tokens, LANES), zero above `lanes`. Neighbouring tokens of channel-first tensors come
// in vectors and are transposed.
template <class T>
void gather(const T *from, int64_t channel, int64_t token, int lanes, int64_t tokens, float *tile) {
    if (channel == 1 && lanes == LANES) {
        for (int64_t t = 0; t < tokens; ++t) store(tile + t * LANES, load(from + t * token));
        return;
    }
    int64_t t = 0;
    if (token == 1 || token == -1) {
        for (; t + LANES <= tokens; t += LANES) {
            const T *first = token == 1 ? from + t : from - t - (LANES - 1);
            Vec rows[LANES];
            for (int i = 0; i < LANES; ++i) rows[i] = i < lanes ? load(first + i * channel) : broadcast(0.0f);
            transpose(rows);
            for (int i = 0; i < LANES; ++i) store(tile + (t + (token == 1 ? i : LANES - 1 - i)) * LANES, rows[i]);
        }
    }
    for (; t < tokens; ++t) {
        for (int i = 0; i < LANES; ++i) {
            tile[t * LANES + i] = i < lanes ? to_float(from[i * channel + t * token]) : 0.0f;
        }
    }
}

// The opposite of `gather`.
template <class T>
void scatter(const float *tile, int lanes, int64_t tokens, T *to, int64_t channel, int64_t token) {
    if (channel == 1 && lanes == LANES) {
        for (int64_t t = 0; t < tokens; ++t) store(to + t * token, load(tile + t * LANES));
        return;
    }
    int64_t t = 0;
    if (token == 1 || token == -1) {
        for (; t + LANES <= tokens; t += LANES) {
            T *first = token == 1 ? to + t : to - t - (LANES - 1);
            Vec rows[LANES];
            for (int i = 0; i < LANES; ++i) rows[i] = load(tile + (t + (token == 1 ? i : LANES - 1 - i)) * LANES);
            transpose(rows);
            for (int i = 0; i < LANES; ++i) {
                if (i < lanes) store(first + i * channel, rows[i]);
            }
        }
    }
    for (; t < tokens; ++t) store_lanes(to + t * token, channel, lanes, load(tile + t * LANES));
}

// `tokens` rows of a sequence from `from`: where they lie if they are dense and in fp32, else gathered into `tile`.
inline Rows rows_of(const float *from, int64_t channel, int64_t token, int lanes, int64_t tokens, float *tile) {
    if (channel == 1 && lanes == LANES) return {from, token};
    gather(from, channel, token, lanes, tokens, tile);
    return {tile, LANES};
}
inline Rows rows_of(const bfloat16 *from, int64_t channel, int64_t token, int lanes, int64_t tokens, float *tile) {
    gather(from, channel, token, lanes, tokens, tile);
    return {tile, LANES};
}

// Where rows for a sequence are written: in their place if they are dense and in fp32, else in a tile that
// `written` puts there.
template <class T>
struct Target {
    T *to;
    int64_t channel, token;
    int lanes;
    float *tile;

    bool direct(const float *) const { return channel == 1 && lanes == LANES; }
    bool direct(const bfloat16 *) const { return false; }
    float *place(float *p) const { return p; }
    float *place(bfloat16 *) const { return tile; }

    float *rows() const { return direct(to) ? place(to) : tile; }
    int64_t step() const { return direct(to) ? token : LANES; }
    void written(int64_t tokens) const {
        if (!direct(to)) scatter(tile, lanes, tokens, to, channel, token);
    }
};
