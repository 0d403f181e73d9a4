// A libcuda.so.1 without a card, for the tests of src/cuda/driver.rs (src/cuda/driver/tests.rs compiles and loads it).
//
// Device memory is host memory. What is asked of a stream waits in its queue until somebody waits for it: so a staging buffer that is
// written again too early, or read too early, gives wrong data, and so does a stream that should wait for another one. Calls without a
// current context fail, as on a card.
// The environment says what to be: FAKE_VERSION (12020), FAKE_CAPABILITY (86), FAKE_INIT (a result of cuInit), FAKE_REFUSE
// (cubin: only PTX can be loaded; all: neither).

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>

namespace {

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NO_BINARY = 209, INVALID_PTX = 218, NOT_FOUND = 500 };

const size_t TOTAL = size_t(1) << 30;

struct Stream {
    std::deque<std::function<void()>> queue;
    uint64_t asked, done; // of all that ever entered the queue
};

std::mutex lock_;
std::deque<Stream> streams;
std::map<uint64_t, size_t> memory, pinned;
thread_local bool entered;

struct Event { Stream *stream; uint64_t at; };
struct Function { unsigned allowed; };

int number(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

int ask(Stream *stream, std::function<void()> work) {
    if (!entered) return INVALID_CONTEXT;
    stream->queue.push_back(std::move(work));
    stream->asked++;
    return SUCCESS;
}

int finish(Stream *stream, uint64_t until) {
    if (!entered) return INVALID_CONTEXT;
    while (stream && stream->done < until) {
        auto work = std::move(stream->queue.front());
        stream->queue.pop_front();
        stream->done++;
        work();
    }
    return SUCCESS;
}

int finish_all() {
    for (auto &stream : streams)
        if (int error = finish(&stream, stream.asked)) return error;
    return SUCCESS;
}

size_t used() {
    size_t sum = 0;
    for (auto &[address, bytes] : memory) sum += bytes;
    return sum;
}

/// Do these bytes lie in one allocation?
bool inside(const std::map<uint64_t, size_t> &allocations, uint64_t address, size_t bytes) {
    auto after = allocations.upper_bound(address);
    if (after == allocations.begin()) return false;
    auto [start, size] = *--after;
    return address + bytes <= start + size;
}

bool inside(uint64_t address, size_t bytes) { return inside(memory, address, bytes); }

/// Copies that run beside the kernels must read and write page-locked memory.
bool locked(const void *address, size_t bytes) { return inside(pinned, reinterpret_cast<uint64_t>(address), bytes); }

} // namespace

#define CALL extern "C" int
#define LOCKED std::lock_guard<std::mutex> guard(lock_)

CALL cuGetErrorString(int error, const char **text) {
    static thread_local std::string said;
    said = "fake error " + std::to_string(error);
    *text = said.c_str();
    return SUCCESS;
}
CALL cuDriverGetVersion(int *version) { return *version = number("FAKE_VERSION", 12020), SUCCESS; }
CALL cuInit(unsigned) { return number("FAKE_INIT", SUCCESS); }
CALL cuDeviceGetCount(int *count) { return *count = 1, SUCCESS; }
CALL cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal == 0 ? SUCCESS : 101; }
CALL cuDeviceGetName(char *name, int length, int) { return snprintf(name, length, "Fake card"), SUCCESS; }
CALL cuDeviceTotalMem_v2(size_t *bytes, int) { return *bytes = TOTAL, SUCCESS; }
CALL cuDeviceGetAttribute(int *value, int attribute, int) {
    int capability = number("FAKE_CAPABILITY", 86);
    *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : attribute == 16 ? 20 : 0;
    return SUCCESS;
}
CALL cuDevicePrimaryCtxRetain(void **context, int) { return *context = &lock_, SUCCESS; }
CALL cuCtxSetCurrent(void *context) { return entered = context == &lock_, SUCCESS; }
CALL cuStreamCreate(Stream **stream, unsigned) {
    LOCKED;
    streams.emplace_back();
    return *stream = &streams.back(), entered ? SUCCESS : INVALID_CONTEXT;
}
CALL cuStreamSynchronize(Stream *stream) {
    LOCKED;
    return finish(stream, stream->asked);
}
CALL cuStreamWaitEvent(Stream *stream, Event *event, unsigned) {
    LOCKED;
    Event now = *event; // It may be destroyed before the stream comes to it.
    return ask(stream, [=] { finish(now.stream, now.at); });
}

CALL cuMemGetInfo_v2(size_t *free, size_t *total) {
    LOCKED;
    *free = TOTAL - used();
    *total = TOTAL;
    return entered ? SUCCESS : INVALID_CONTEXT;
}
CALL cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    LOCKED;
    if (!entered) return INVALID_CONTEXT;
    if (bytes == 0) return INVALID_VALUE;
    if (used() + bytes > TOTAL) return OUT_OF_MEMORY;
    *address = reinterpret_cast<uint64_t>(malloc(bytes));
    memory[*address] = bytes;
    return SUCCESS;
}
CALL cuMemFree_v2(uint64_t address) {
    LOCKED;
    if (int error = finish_all()) return error;
    if (!memory.erase(address)) return INVALID_VALUE;
    free(reinterpret_cast<void *>(address));
    return SUCCESS;
}
CALL cuMemHostAlloc(void **address, size_t bytes, unsigned flags) {
    LOCKED;
    if (!entered) return INVALID_CONTEXT;
    if (bytes == 0 || flags != 1) return INVALID_VALUE;
    if (bytes > TOTAL) return OUT_OF_MEMORY;
    *address = malloc(bytes);
    pinned[reinterpret_cast<uint64_t>(*address)] = bytes;
    return SUCCESS;
}
CALL cuMemFreeHost(void *address) {
    LOCKED;
    if (!entered) return INVALID_CONTEXT;
    if (!pinned.erase(reinterpret_cast<uint64_t>(address))) return INVALID_VALUE;
    free(address);
    return SUCCESS;
}
CALL cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, Stream *stream) {
    LOCKED;
    if (!inside(to, bytes) || !locked(from, bytes)) return INVALID_VALUE;
    return ask(stream, [=] { memcpy(reinterpret_cast<void *>(to), from, bytes); });
}
CALL cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, Stream *stream) {
    LOCKED;
    if (!inside(from, bytes) || !locked(to, bytes)) return INVALID_VALUE;
    return ask(stream, [=] { memcpy(to, reinterpret_cast<void *>(from), bytes); });
}
CALL cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, Stream *stream) {
    LOCKED;
    if (!inside(to, bytes) || !inside(from, bytes)) return INVALID_VALUE;
    return ask(stream, [=] { memcpy(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes); });
}
CALL cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, Stream *stream) {
    LOCKED;
    if (!inside(to, bytes)) return INVALID_VALUE;
    return ask(stream, [=] { memset(reinterpret_cast<void *>(to), value, bytes); });
}

CALL cuEventCreate(Event **event, unsigned) { return *event = new Event{nullptr, 0}, entered ? SUCCESS : INVALID_CONTEXT; }
CALL cuEventRecord(Event *event, Stream *stream) {
    LOCKED;
    return *event = {stream, stream->asked}, entered ? SUCCESS : INVALID_CONTEXT;
}
CALL cuEventSynchronize(Event *event) {
    LOCKED;
    return finish(event->stream, event->at);
}
CALL cuEventElapsedTime(float *milliseconds, Event *from, Event *to) {
    LOCKED;
    if (to->stream->done < to->at) return 600;
    return *milliseconds = float(to->at - from->at), SUCCESS;
}
CALL cuEventDestroy_v2(Event *event) { return delete event, SUCCESS; }

CALL cuModuleLoadData(void **module, const void *image) {
    bool elf = !memcmp(image, "\x7f" "ELF", 4);
    if (!entered) return INVALID_CONTEXT;
    if (!elf || reinterpret_cast<uint64_t>(image) % 8) return INVALID_VALUE;
    return *module = &memory, getenv("FAKE_REFUSE") ? NO_BINARY : SUCCESS;
}
CALL cuModuleLoadDataEx(void **module, const void *image, unsigned count, int *options, void **values) {
    if (!entered) return INVALID_CONTEXT;
    bool ptx = strstr(static_cast<const char *>(image), ".version 8.0\n");
    if (!ptx || count != 2 || options[0] != 5 || options[1] != 6) return INVALID_VALUE;
    const char *refuse = getenv("FAKE_REFUSE");
    if (refuse && !strcmp(refuse, "all")) {
        snprintf(static_cast<char *>(values[0]), reinterpret_cast<size_t>(values[1]), "ptxas: no such machine\nmore");
        return INVALID_PTX;
    }
    return *module = &memory, SUCCESS;
}
CALL cuModuleGetFunction(Function **function, void *module, const char *name) {
    return *function = new Function{48 << 10}, module == &memory && *name ? SUCCESS : NOT_FOUND;
}
CALL cuFuncSetAttribute(Function *function, int attribute, int value) {
    if (attribute != 8 || value > 99 << 10) return INVALID_VALUE;
    return function->allowed = value, SUCCESS;
}
/// Every kernel writes its number of threads where its first parameter points.
CALL cuLaunchKernel(Function *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared,
                    Stream *stream, void **parameters, void **) {
    LOCKED;
    if (shared > function->allowed) return INVALID_VALUE;
    uint64_t out = *static_cast<uint64_t *>(*parameters);
    if (!inside(out, 4)) return INVALID_VALUE;
    return ask(stream, [=] { *reinterpret_cast<uint32_t *>(out) = x * y * z * threads; });
}
