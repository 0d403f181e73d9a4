/// Source lines of machine addresses, for reports about plain loads and stores. Only ever used on the way to
/// an error.
namespace emu {

struct Place {
    char text[128];
};

/// "file.cu:12" by binutils' addr2line if there is one, else an offset into the program. Of a chain of
/// inlined functions, the innermost that is in a .cu.
[[maybe_unused]] static Place place_of(const void *pc) {
    Place place = {"?"};
    Dl_info info;
    if (!pc || !dladdr(pc, &info) || !info.dli_fname) return place;
    // A return address belongs to the line after the call: one byte less is within it.
    unsigned long offset =
        (unsigned long)(static_cast<const char *>(pc) - static_cast<const char *>(info.dli_fbase)) - 1;
    std::string s, text;
    char program[4096] = "";
    if (info.dli_fname[0] != '/' && readlink("/proc/self/exe", program, sizeof program - 1) > 0)
        info.dli_fname = program;
    append(s, "addr2line -i -s -e '%s' 0x%lx 2>/dev/null", info.dli_fname, offset);
    if (FILE *pipe = popen(s.c_str(), "r")) {
        char line[256];
        while (fgets(line, sizeof line, pipe)) {
            std::string one(line, strcspn(line, " \n"));
            if (text.empty() ||
                (text.find(".cu:") == std::string::npos && one.find(".cu:") != std::string::npos))
                text = one;
        }
        pclose(pipe);
    }
    if (text.empty() || text[0] == '?') append(text, "+0x%lx", offset);
    snprintf(place.text, sizeof place.text, "%s", text.c_str());
    return place;
}

} // namespace emu
