/* Convolutions of the open channels of gated residual blocks, for the CPU.

   Channels are in blocks of 16. A convolution reads the open blocks of its input and computes the open blocks
   of its output, and is not even asked about the others:

       y[o] = act(bias[o] + sum over open blocks i and places t of  w[o][i][t] * x[i] shifted by t  + other[o])

   The innermost loops multiply a few pixels (segments of 7 neighbours in a row) by one row of weights (16
   output channels) and keep all sums in registers. Pixels may be any distance apart in memory, so that images
   are read and written in the order of channels_last, and in blocks, [block][row][column][16], with a border of
   zeros, between two convolutions.

   Work is cut into tasks that threads take from a counter. A phase begins when all tasks of the one before are
   done, whoever did them: so any number of threads may come, and late ones are not waited for.

   Strides and offsets are numbers of floats. */

#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define BLOCK 16
#define SEGMENT 7
#define MOST_LAYERS 8
#define MOST_HIDDEN 256
/* In how many parts of an image sums are kept. */
#define PARTS 8
/* How many segments, and vectors of output channels, are computed together: as many sums as fit into registers. */
#if LANES == 16
#define SEGMENTS_OF_ONE 4
#define SEGMENTS_OF_TWO 2
#else
#define SEGMENTS_OF_ONE 2
#endif

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t mask __attribute__((vector_size(4 * LANES)));

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif


/* Images in memory. */
typedef struct {
    int64_t buffer; /* which */
    int64_t start;  /* offset of the first pixel in it */
    int64_t image, block, row, pixel;
    int64_t channels;
    int64_t padded_rows, padded_columns; /* of the border, above and left, below and right */
} images;

typedef struct {
    const float *weight; /* [output block][input block][place][16 inputs][16 outputs] */
    const float *bias;
    const int64_t *places; /* offset of each place of the kernel */
    int64_t number_of_places;
    images x, y;
    int64_t in_blocks, out_blocks;
    int64_t rows, columns;         /* of the output */
    int64_t in_gates, out_gates;   /* which gates switch the input's and the output's channels, or -1 */
    int64_t other;                 /* which buffer is added, in the order of the output, or -1 */
    int64_t relu;
} convolution;

/* The gates of one layer: two linear layers that read the means of the channels, and what each gate switches. */
typedef struct {
    int64_t hidden, number;
    const float *first_weight, *first_bias, *last_weight, *last_bias; /* [input][output] */
    int64_t blocks;
    const int32_t *of_channel; /* the gate of each channel, or -1 where it is always open */
    int64_t whole_blocks;      /* whether the channels of a block always have the same gate */
} gating;

/* Buffers: the input, its copy in blocks, the output, what is added to it, and what is between convolutions. */
enum { X, COPY, Y, OTHER, INNER };
#define MOST_BUFFERS (INNER + MOST_LAYERS)

/* A residual block: convolutions one after the other, and gates that read the input. */
typedef struct {
    int64_t rows, columns, channels; /* of the input */
    int64_t output;                  /* floats of an image of the output */
    int64_t number_of_layers, number_of_gatings;
    convolution layers[MOST_LAYERS];
    gating gatings[MOST_LAYERS];
    images copy;
    int64_t sizes[MOST_BUFFERS]; /* floats of an image, where memory is needed for them */
} residual;

/* Which blocks are open, image by image. */
typedef struct {
    int32_t *count, *open; /* open: [image][blocks] */
    float *mask;           /* [image][channels], or NULL if whole blocks are switched */
} opened;

static inline vector load(const float *p) { return *(const vector *)p; }
static inline void store(float *p, vector v) { *(vector *)p = v; }

/* Threads */

typedef void (*task_function)(const void *what, int64_t task);
typedef struct {
    const void *what;
    task_function run;
    int64_t tasks;
} phase;
typedef struct {
    const phase *phases;
    int64_t number;
    int64_t *taken, *done;
} job;
/* As GOMP_parallel of the OpenMP runtime that PyTorch has loaded. */
typedef void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

static void wait_a_little(int64_t waited) {
    if (waited > 4096) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
    else __builtin_ia32_pause();
#endif
}

static void work(void *argument) {
    const job *j = argument;
    for (int64_t p = 0; p < j->number; p++) {
        const phase *now = j->phases + p;
        for (;;) {
            int64_t task = __atomic_fetch_add(j->taken + p, 1, __ATOMIC_RELAXED);
            if (task >= now->tasks) break;
            now->run(now->what, task);
            __atomic_fetch_add(j->done + p, 1, __ATOMIC_RELEASE);
        }
        for (int64_t waited = 0; __atomic_load_n(j->done + p, __ATOMIC_ACQUIRE) < now->tasks; waited++)
            wait_a_little(waited);
    }
}

/* A convolution */

typedef struct {
    const convolution *c;
    const opened *in, *out; /* NULL where all blocks are open */
    const float *x, *other;
    float *y;
    int64_t number; /* of images */
    int64_t parts, part; /* of an image, and segments in each */
} convolving;

/* One or a few segments of pixels, and one or two vectors of output channels. */
typedef struct {
    const float *x[4];
    int64_t y[4];             /* offset of each segment's first pixel */
    int first[4], end[4];     /* which pixels of a segment are to be written */
    const float *weight[2];
    int64_t channel[2], offset[2]; /* of each vector: its first channel, and where it is within a pixel */
    const float *mask;
    const int32_t *open; /* blocks of the input, or NULL where they are 0, 1, 2 and so on */
    int64_t number_of_open;
} tile;

ALWAYS_INLINE void compute(const int segments, const int vectors, const convolving *v, const tile *t) {
    const convolution *c = v->c;
    vector sums[4][SEGMENT][2];
    UNROLL for (int s = 0; s < segments; s++) UNROLL for (int p = 0; p < SEGMENT; p++)
        UNROLL for (int n = 0; n < vectors; n++) sums[s][p][n] = (vector){0};
    UNROLL for (int s = 0; s < segments; s++) UNROLL for (int p = 0; p < SEGMENT; p++) UNROLL for (int n = 0; n < vectors; n++) {
        int64_t at = t->y[s] + p * c->y.pixel + t->offset[n];
        __builtin_prefetch(v->y + at, 1);
        if (v->other) __builtin_prefetch(v->other + at, 0, 2);
    }
    int64_t one = (int64_t)sizeof(float) * c->x.pixel, three = 3 * one, five = 5 * one;
    int64_t size = c->number_of_places * BLOCK * BLOCK; /* of the weights of a block */
    int64_t ahead = c->number_of_places > 4 ? 1 : 4;
    for (int64_t i = 0; i < t->number_of_open; i++) {
        int64_t block = t->open ? t->open[i] : i;
        const float *weight[2];
        /* The weights of a block after this one, which may be far away in memory. */
        int64_t later = i + ahead < t->number_of_open ? (t->open ? t->open[i + ahead] - block : ahead) : 0;
        later *= size;
        UNROLL for (int n = 0; n < vectors; n++)
            weight[n] = t->weight[n] + block * size;
        for (int64_t place = 0; place < c->number_of_places; place++) {
            int64_t offset = block * c->x.block + c->places[place];
            const float *x[4];
            UNROLL for (int s = 0; s < segments; s++) x[s] = t->x[s] + offset;
            for (int64_t k = 0; k < BLOCK; k++) {
                vector row[2];
                UNROLL for (int n = 0; n < vectors; n++) {
                    row[n] = load(weight[n]);
                    __builtin_prefetch(weight[n] + later);
                    weight[n] += BLOCK;
                }
                UNROLL for (int s = 0; s < segments; s++) {
                    const char *at = (const char *)x[s]++;
                    const char *pixel[SEGMENT] = {
                        at, at + one, at + 2 * one, at + three, at + 4 * one, at + five, at + 2 * three};
                    UNROLL for (int p = 0; p < SEGMENT; p++) {
                        float value = *(const float *)pixel[p];
                        UNROLL for (int n = 0; n < vectors; n++) sums[s][p][n] += row[n] * value;
                    }
                }
            }
        }
    }
    /* All loads before all stores, since pixels may be whole pages apart, where one waits for the other. */
    UNROLL for (int n = 0; n < vectors; n++) {
        int64_t channel = t->channel[n], valid = c->y.channels - channel;
        vector bias = load(c->bias + channel);
        UNROLL for (int s = 0; s < segments; s++) UNROLL for (int p = 0; p < SEGMENT; p++) {
            sums[s][p][n] += bias;
            if (!v->other || p < t->first[s] || p >= t->end[s]) continue;
            const float *other = v->other + t->y[s] + p * c->y.pixel + t->offset[n];
            if (valid >= LANES) sums[s][p][n] += load(other);
            else for (int64_t k = 0; k < valid; k++) sums[s][p][n][k] += other[k];
        }
    }
    UNROLL for (int n = 0; n < vectors; n++) {
        int64_t channel = t->channel[n], valid = c->y.channels - channel;
        UNROLL for (int s = 0; s < segments; s++) UNROLL for (int p = 0; p < SEGMENT; p++) {
            if (p < t->first[s] || p >= t->end[s]) continue;
            vector sum = sums[s][p][n];
            /* What is no number stays none. */
            if (c->relu) sum = (vector)((mask)sum & ~(sum < (vector){0}));
            if (t->mask) sum *= load(t->mask + channel);
            float *y = v->y + t->y[s] + p * c->y.pixel + t->offset[n];
            if (valid >= LANES) store(y, sum);
            else for (int64_t k = 0; k < valid; k++) y[k] = sum[k];
        }
    }
}

#define KERNEL(segments, vectors) \
    static __attribute__((noinline)) void compute_##segments##_##vectors(const convolving *v, const tile *t) { \
        compute(segments, vectors, v, t); \
    }
KERNEL(1, 1) KERNEL(2, 1)
#if LANES == 16
KERNEL(3, 1) KERNEL(4, 1) KERNEL(1, 2) KERNEL(2, 2)
#endif

static void compute_tile(const convolving *v, const tile *t, int segments, int vectors) {
#if LANES == 16
    if (vectors == 2) (segments == 2 ? compute_2_2 : compute_1_2)(v, t);
    else if (segments > 2) (segments == 4 ? compute_4_1 : compute_3_1)(v, t);
    else
#endif
    (segments == 2 ? compute_2_1 : compute_1_1)(v, t);
}

/* Segments from one to another of some vectors of an image. */
static void compute_segments(const convolving *v, tile *t, int64_t image, int64_t first, int64_t end, int vectors) {
    const convolution *c = v->c;
    int64_t in_row = (c->columns + SEGMENT - 1) / SEGMENT, row = first / in_row, segment = first % in_row;
    int64_t most = SEGMENTS_OF_ONE;
#if LANES == 16
    if (vectors == 2) most = SEGMENTS_OF_TWO;
#endif
    while (first < end) {
        int number = (int)(end - first < most ? end - first : most);
        for (int s = 0; s < number; s++) {
            int64_t column = segment * SEGMENT;
            t->first[s] = 0, t->end[s] = SEGMENT;
            if (column + SEGMENT > c->columns) { /* The last of a row begins earlier, or ends earlier. */
                if (c->columns < SEGMENT) t->end[s] = (int)c->columns;
                else t->first[s] = (int)(column + SEGMENT - c->columns), column = c->columns - SEGMENT;
            }
            t->x[s] = v->x + image * c->x.image + row * c->x.row + column * c->x.pixel;
            t->y[s] = image * c->y.image + row * c->y.row + column * c->y.pixel;
            if (++segment == in_row) segment = 0, row++;
        }
        compute_tile(v, t, number, vectors);
        first += number;
    }
}

/* The zeros around a block of an image. */
static void clear_border(const convolving *v, int64_t image, int64_t block) {
    const images *y = &v->c->y;
    int64_t above = y->padded_rows, left = y->padded_columns;
    if (!above && !left) return;
    int64_t rows = v->c->rows, columns = v->c->columns, wide = columns + 2 * left;
    float *start = v->y + image * y->image + block * y->block - above * y->row - left * BLOCK;
    memset(start, 0, sizeof(float) * (size_t)(above * wide * BLOCK));
    memset(start + (above + rows) * y->row, 0, sizeof(float) * (size_t)(above * wide * BLOCK));
    for (int64_t row = above; row < above + rows; row++) {
        memset(start + row * y->row, 0, sizeof(float) * (size_t)(left * BLOCK));
        memset(start + row * y->row + (left + columns) * BLOCK, 0, sizeof(float) * (size_t)(left * BLOCK));
    }
}

/* A part of the pixels of an image, and two neighbouring blocks of output channels as far as they are open.
   Tasks that use the same weights come one after the other. */
static void convolve_part(const void *what, int64_t task) {
    const convolving *v = what;
    const convolution *c = v->c;
    int64_t part = task % v->parts, image = task / v->parts % v->number, pair = task / v->parts / v->number;
    int64_t blocks[2];
    int found = 0;
    if (v->out) {
        const int32_t *open = v->out->open + image * c->out_blocks;
        for (int32_t k = 0; k < v->out->count[image]; k++)
            if (open[k] / 2 == pair) blocks[found++] = open[k];
    } else
        for (int64_t block = 2 * pair; block < c->out_blocks && block < 2 * pair + 2; block++) blocks[found++] = block;
    if (!found) return;
    tile t;
    t.open = v->in ? v->in->open + image * c->in_blocks : NULL;
    t.number_of_open = v->in ? v->in->count[image] : c->in_blocks;
    t.mask = v->out && v->out->mask ? v->out->mask + image * c->out_blocks * BLOCK : NULL;
    int64_t in_row = (c->columns + SEGMENT - 1) / SEGMENT, segments = in_row * c->rows;
    int64_t first = part * v->part, end = first + v->part < segments ? first + v->part : segments;
    int together = LANES == 16 ? found : 1;
    for (int k = 0; k < found; k += together)
        for (int64_t lane = 0; lane < BLOCK; lane += LANES) {
            for (int n = 0; n < together; n++) {
                int64_t block = blocks[k + n];
                t.weight[n] = c->weight + block * c->in_blocks * c->number_of_places * BLOCK * BLOCK + lane;
                t.channel[n] = block * BLOCK + lane;
                t.offset[n] = block * c->y.block + lane;
            }
            compute_segments(v, &t, image, first, end, together);
        }
    if (part == 0)
        for (int k = 0; k < found; k++) clear_border(v, image, blocks[k]);
}

/* Gates */

/* What is known of the images of a call. */
typedef struct {
    const residual *r;
    int64_t first, number; /* images */
    int64_t part, parts;   /* rows in a part of an image, and parts */
    float *buffers[MOST_BUFFERS];
    float *sums; /* [image][part][channels, in whole blocks] */
    float *logits; /* of all gates of an image side by side; from an image to the next: */
    int64_t of_image;
    const float *const *forced; /* what is positive where a gate is open, if that is not the logits; or NULL */
    const float *thresholds;    /* what the logits exceed where a gate is open */
    opened lists[MOST_LAYERS];
} known;

/* Two blocks of channels of some rows of an image: their sums, and the copy. */
static void prepare_part(const void *what, int64_t task) {
    const known *v = what;
    const residual *r = v->r;
    const images *copy = &r->copy;
    int64_t blocks = (r->channels + BLOCK - 1) / BLOCK, pairs = (blocks + 1) / 2;
    int64_t pair = task % pairs, part = task / pairs % v->parts, image = task / pairs / v->parts;
    int64_t first = part * v->part, end = first + v->part < r->rows ? first + v->part : r->rows;
    int64_t above = copy->padded_rows, left = copy->padded_columns;
    for (int64_t block = 2 * pair; block < blocks && block < 2 * pair + 2; block++) {
        float total[BLOCK] = {0};
        int64_t valid = r->channels - block * BLOCK;
        if (valid > BLOCK) valid = BLOCK;
        float *plane = NULL;
        if (r->sizes[COPY]) plane = v->buffers[COPY] + copy->start + image * copy->image + block * copy->block;
        for (int64_t row = first; row < end; row++) {
            const float *from = v->buffers[X] + (image * r->rows + row) * r->columns * r->channels + block * BLOCK;
            float *to = plane ? plane + row * copy->row : NULL;
            if (to) {
                memset(to - left * BLOCK, 0, sizeof(float) * (size_t)(left * BLOCK));
                memset(to + r->columns * BLOCK, 0, sizeof(float) * (size_t)(left * BLOCK));
            }
            if (valid == BLOCK) {
                vector sums[BLOCK / LANES] = {{0}};
                for (int64_t column = 0; column < r->columns; column++, from += r->channels)
                    for (int n = 0; n < BLOCK / LANES; n++) {
                        vector value = load(from + n * LANES);
                        sums[n] += value;
                        if (to) store(to + column * BLOCK + n * LANES, value);
                    }
                for (int k = 0; k < BLOCK; k++) total[k] += sums[k / LANES][k % LANES];
            } else
                for (int64_t k = 0; k < BLOCK; k++) {
                    float sum = 0;
                    for (int64_t column = 0; column < r->columns; column++) {
                        float value = k < valid ? from[column * r->channels + k] : 0;
                        sum += value;
                        if (to) to[column * BLOCK + k] = value;
                    }
                    total[k] += sum;
                }
        }
        memcpy(v->sums + ((image * v->parts + part) * blocks + block) * BLOCK, total, sizeof total);
        if (plane && above) {
            size_t size = sizeof(float) * (size_t)(above * copy->row);
            if (part == 0) memset(plane - above * copy->row - left * BLOCK, 0, size);
            if (part == v->parts - 1) memset(plane + r->rows * copy->row - left * BLOCK, 0, size);
        }
    }
}

static void multiply(const float *x, int64_t inputs, const float *weight, const float *bias, float scale, float *y, int64_t outputs) {
    int64_t k = 0;
    for (; k + LANES <= outputs; k += LANES) {
        vector sums[4] = {{0}};
        int64_t i = 0;
        for (; i + 4 <= inputs; i += 4)
            UNROLL for (int n = 0; n < 4; n++) sums[n] += x[i + n] * load(weight + (i + n) * outputs + k);
        for (; i < inputs; i++) sums[0] += x[i] * load(weight + i * outputs + k);
        store(y + k, (sums[0] + sums[1] + (sums[2] + sums[3])) * scale + load(bias + k));
    }
    for (; k < outputs; k++) {
        float sum = 0;
        for (int64_t i = 0; i < inputs; i++) sum += x[i] * weight[i * outputs + k];
        y[k] = sum * scale + bias[k];
    }
}

/* Which blocks of an image are open. */
static void find_open(const gating *g, const float *values, float threshold, int64_t image, opened *o) {
    o->count[image] = 0;
    for (int64_t block = 0; block < g->blocks; block++) {
        int any = 0;
        for (int64_t k = 0; k < (g->whole_blocks ? 1 : BLOCK); k++) {
            int32_t gate = g->of_channel[block * BLOCK + k];
            int is_open = gate < 0 || values[gate] > threshold;
            any |= is_open;
            if (o->mask) o->mask[(image * g->blocks + block) * BLOCK + k] = (float)is_open;
        }
        if (any) o->open[image * g->blocks + o->count[image]++] = (int32_t)block;
    }
}

/* The logits of an image, and what is open. */
static void decide(const void *what, int64_t image) {
    known *v = (known *)what;
    const residual *r = v->r;
    int64_t channels = (r->channels + BLOCK - 1) / BLOCK * BLOCK;
    float *sums = v->sums + image * v->parts * channels;
    for (int64_t part = 1; part < v->parts; part++)
        for (int64_t k = 0; k < channels; k += LANES) store(sums + k, load(sums + k) + load(sums + part * channels + k));
    float *logits = v->logits + (v->first + image) * v->of_image;
    for (int64_t k = 0; k < r->number_of_gatings; k++) logits += r->gatings[k].number;
    for (int64_t k = r->number_of_gatings - 1; k >= 0; k--) {
        const gating *g = r->gatings + k;
        float hidden[MOST_HIDDEN];
        logits -= g->number;
        multiply(sums, r->channels, g->first_weight, g->first_bias, 1.0f / (float)(r->rows * r->columns), hidden, g->hidden);
        for (int64_t i = 0; i < g->hidden; i++) hidden[i] = hidden[i] < 0 ? 0 : hidden[i];
        multiply(hidden, g->hidden, g->last_weight, g->last_bias, 1, logits, g->number);
        const float *forced = v->forced[k] ? v->forced[k] + (v->first + image) * g->number : NULL;
        find_open(g, forced ? forced : logits, forced ? 0 : v->thresholds[k], image, v->lists + k);
        /* What is not read later is not computed. */
        if (k + 1 < r->number_of_gatings && !v->lists[k + 1].count[image]) v->lists[k].count[image] = 0;
    }
}

/* A residual block */

static int64_t whole(int64_t floats) { return (floats + BLOCK - 1) / BLOCK * BLOCK; }

static int64_t floats_of_lists(const gating *g) {
    return whole(1 + g->blocks) + (g->whole_blocks ? 0 : g->blocks * BLOCK);
}

/* How many floats of memory are needed for each image. */
int64_t needed(const residual *r) {
    int64_t floats = PARTS * whole(r->channels);
    for (int64_t k = 0; k < MOST_BUFFERS; k++) floats += whole(r->sizes[k]);
    for (int64_t k = 0; k < r->number_of_gatings; k++) floats += floats_of_lists(r->gatings + k);
    return floats;
}

/* How the phases of a block find what they need. */
typedef struct {
    known v;
    convolving layers[MOST_LAYERS];
} plan;

/* The phases of a block; gives how many there are. */
static int64_t make_plan(plan *p, phase *phases, const residual *r, int64_t first, int64_t number, float *x, float *other, float *y,
                         float *memory, float *logits, int64_t of_image, const float *const *forced, const float *thresholds) {
    known *v = &p->v;
    *v = (known){r, first, number, .sums = memory, .logits = logits, .of_image = of_image, .forced = forced};
    v->thresholds = thresholds;
    memory += number * PARTS * whole(r->channels);
    for (int64_t k = 0; k < MOST_BUFFERS; k++) v->buffers[k] = memory, memory += number * whole(r->sizes[k]);
    v->buffers[X] = x, v->buffers[Y] = y, v->buffers[OTHER] = other;
    for (int64_t k = 0; k < r->number_of_gatings; k++) {
        const gating *g = r->gatings + k;
        int32_t *integers = (int32_t *)memory;
        v->lists[k] = (opened){integers, integers + number, g->whole_blocks ? NULL : memory + number * whole(1 + g->blocks)};
        memory += number * floats_of_lists(g);
    }
    v->part = (r->rows + PARTS - 1) / PARTS;
    v->parts = (r->rows + v->part - 1) / v->part;
    int64_t pairs = (whole(r->channels) / BLOCK + 1) / 2;
    phases[0] = (phase){v, prepare_part, number * v->parts * pairs};
    phases[1] = (phase){v, decide, number};
    for (int64_t l = 0; l < r->number_of_layers; l++) {
        const convolution *c = r->layers + l;
        int64_t segments = (c->columns + SEGMENT - 1) / SEGMENT * c->rows;
        /* Small enough to be shared out, a multiple of what is computed together. */
        int64_t part = (segments / 16 + 3) / 4 * 4;
        if (part < 4) part = 4;
        p->layers[l] = (convolving){
            .c = c,
            .in = c->in_gates < 0 ? NULL : v->lists + c->in_gates,
            .out = c->out_gates < 0 ? NULL : v->lists + c->out_gates,
            .x = v->buffers[c->x.buffer] + c->x.start,
            .y = v->buffers[c->y.buffer] + c->y.start,
            .other = c->other < 0 ? NULL : v->buffers[c->other],
            .number = number,
            .part = part,
            .parts = (segments + part - 1) / part,
        };
        phases[2 + l] = (phase){p->layers + l, convolve_part, (c->out_blocks + 1) / 2 * number * p->layers[l].parts};
    }
    return 2 + r->number_of_layers;
}

/* Compute blocks, each of what the one before gives, for some images. x, other and y are in the order of channels_last.
   other: what the first block's branch is added to, or NULL if that is x or a convolution of the block's.
   together: how many images are computed together; with few, they stay in the caches.
   memory: for each of those, what the block needs that needs most, and before that two times the largest output.
   logits: of all gates of an image side by side; forced, thresholds: for each layer of gates of all blocks. Gives
   whether it was done. */
int compute_blocks(const residual *const *blocks, int64_t number_of_blocks, int64_t number, int64_t together, float *x,
                   float *other, float *y, float *memory, int64_t output, float *logits,
                   const float *const *forced, const float *thresholds, parallel run, int64_t threads) {
    const int64_t most = MOST_LAYERS + 2;
    const residual *last = blocks[number_of_blocks - 1];
    size_t of_block = sizeof(plan) + (size_t)most * (sizeof(phase) + 2 * sizeof(int64_t));
    plan *plans = malloc((size_t)number_of_blocks * of_block);
    if (!plans) return 0;
    phase *phases = (phase *)(plans + number_of_blocks);
    int64_t *counters = (int64_t *)(phases + most * number_of_blocks);
    float *between[2] = {memory, memory + together * output};
    int64_t of_image = 0;
    for (int64_t b = 0; b < number_of_blocks; b++)
        for (int64_t k = 0; k < blocks[b]->number_of_gatings; k++) of_image += blocks[b]->gatings[k].number;
    for (int64_t first = 0; first < number; first += together) {
        int64_t now = first + together < number ? together : number - first, made = 0, gatings = 0;
        float *of_block_logits = logits;
        float *from = x + first * blocks[0]->rows * blocks[0]->columns * blocks[0]->channels;
        float *add = other ? other + first * last->output : from;
        for (int64_t b = 0; b < number_of_blocks; b++) {
            float *to = b + 1 < number_of_blocks ? between[b % 2] : y + first * last->output;
            made += make_plan(plans + b, phases + made, blocks[b], first, now, from, add, to,
                              memory + 2 * together * output, of_block_logits, of_image, forced + gatings,
                              thresholds + gatings);
            gatings += blocks[b]->number_of_gatings;
            for (int64_t k = 0; k < blocks[b]->number_of_gatings; k++) of_block_logits += blocks[b]->gatings[k].number;
            from = add = to;
        }
        memset(counters, 0, sizeof(int64_t) * 2 * (size_t)made);
        job j = {phases, made, counters, counters + made};
        if (run && threads > 1) run(work, &j, (unsigned)threads, 0);
        else work(&j);
    }
    free(plans);
    return 1;
}

/* Maximum pooling of images in the order of channels_last. */
typedef struct {
    int64_t rows, columns, channels, out_rows, out_columns;
    int64_t kernel[2], stride[2], padding[2];
} pooling;

typedef struct {
    const pooling *p;
    const float *x;
    float *y;
} pooled;

/* A row of the output. What is no number is larger than all. */
static void pool_row(const void *what, int64_t task) {
    const pooling *v = ((const pooled *)what)->p;
    const float *images = ((const pooled *)what)->x;
    int64_t image = task / v->out_rows, out_row = task % v->out_rows;
    int64_t above = out_row * v->stride[0] - v->padding[0], below = above + v->kernel[0];
    if (above < 0) above = 0;
    if (below > v->rows) below = v->rows;
    for (int64_t out = 0; out < v->out_columns; out++) {
        int64_t left = out * v->stride[1] - v->padding[1], right = left + v->kernel[1];
        if (left < 0) left = 0;
        if (right > v->columns) right = v->columns;
        float *y = ((const pooled *)what)->y + (task * v->out_columns + out) * v->channels;
        for (int64_t channel = 0; channel + LANES <= v->channels; channel += LANES) {
            vector most = (vector){0} - __builtin_inff();
            for (int64_t row = above; row < below; row++) {
                const float *x = images + ((image * v->rows + row) * v->columns + left) * v->channels + channel;
                for (int64_t column = left; column < right; column++, x += v->channels) {
                    vector value = load(x);
                    mask larger = (value > most) | (value != value);
                    most = (vector)(((mask)value & larger) | ((mask)most & ~larger));
                }
            }
            store(y + channel, most);
        }
    }
}

/* channels: a multiple of 16. */
void pool(const pooling *p, int64_t number, const float *x, float *y, parallel run, int64_t threads) {
    pooled what = {p, x, y};
    phase rows = {&what, pool_row, number * p->out_rows};
    int64_t counters[2] = {0};
    job j = {&rows, 1, counters, counters + 1};
    if (run && threads > 1) run(work, &j, (unsigned)threads, 0);
    else work(&j);
}

/* Ask for large pages for memory that begins with one and was not used so far. */
void use_large_pages(void *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const int64_t page = 1 << 21;
    madvise(memory, (size_t)((bytes + page - 1) / page * page), MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}
