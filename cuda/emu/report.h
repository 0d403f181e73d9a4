/// Messages: what went wrong, where, and what every thread of the block was doing.
namespace emu {

static const char *base_name(const char *file) {
    const char *slash = file ? strrchr(file, '/') : nullptr;
    return slash ? slash + 1 : file ? file : "?";
}

static void append(std::string &s, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void append(std::string &s, const char *format, ...) {
    char text[512];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    s += text;
}

/// "threads 0..20, 25: at __syncthreads (norm.cu:31); threads 21..24: returned": every thread, by what it is
/// doing.
static std::string describe_threads() {
    auto same = [](const Thread &a, const Thread &b) {
        if (a.state != b.state) return false;
        if (a.state == State::AtWarp)
            return a.operation == b.operation && a.mask == b.mask && a.line == b.line && a.file == b.file;
        return a.state != State::AtBlock || (a.line == b.line && a.file == b.file);
    };
    std::string s;
    bool described[MAX_THREADS] = {};
    const Thread *all = the->threads;
    uint32_t n = the->thread_count;
    for (uint32_t first = 0; first < n; first++) {
        if (described[first]) continue;
        const Thread &t = all[first];
        s += s.empty() ? "threads" : "; threads";
        uint32_t ranges = 0;
        for (uint32_t i = first; i < n;) {
            uint32_t end = i;
            for (; end < n && same(t, all[end]); end++) described[end] = true;
            if (end == i) {
                i++;
                continue;
            }
            if (++ranges <= 6)
                append(s, end - i > 1 ? "%s%u..%u" : "%s%u", ranges > 1 ? ", " : " ", i, end - 1);
            if (ranges == 7) s += ", ...";
            i = end;
        }
        switch (t.state) {
        case State::Unstarted: s += ": not started"; break;
        case State::Running: s += ": running"; break;
        case State::Exited: s += ": returned"; break;
        case State::AtBlock: append(s, ": at __syncthreads (%s:%d)", base_name(t.file), t.line); break;
        case State::AtWarp:
            append(s, ": at %s with mask %08x (%s:%d)", t.operation->name, t.mask, base_name(t.file), t.line);
        }
    }
    return s;
}

static void write_error(const std::string &text) {
    if (!the->error || the->error_len == 0) return;
    size_t n = std::min<uint64_t>(text.size(), the->error_len - 1);
    memcpy(the->error, text.data(), n);
    the->error[n] = 0;
}

/// Ends the launch. Nothing on this stack is ever unwound, so everything that owns memory is gone before it
/// is left.
[[noreturn]] static void fail_with(const char *file, int line, const char *what, bool threads) {
    {
        const Here &h = emu_here;
        std::string s;
        append(s, "%s: block (%u, %u, %u), thread (%u, %u, %u)", the->kernel->name, h.block.x, h.block.y,
               h.block.z, h.thread.x, h.thread.y, h.thread.z);
        if (file) append(s, ", %s:%d", base_name(file), line);
        append(s, ": %s", what);
        if (threads) s += ": " + describe_threads();
        write_error(s);
    }
    the->failed = true;
    leave();
    __builtin_unreachable();
}

/// Ends the launch with a message and what every thread is doing.
[[noreturn]] static void fail_threads(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
[[noreturn]] static void fail_threads(const char *file, int line, const char *format, ...) {
    char text[512];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    fail_with(file, line, text, true);
}

} // namespace emu

extern "C" void emu_fail(const char *file, int line, const char *format, ...) {
    char text[512];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    emu::fail_with(file, line, text, false);
}
