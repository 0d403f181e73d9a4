/// Kernels from elsewhere, for planted bugs (scripts/mutants.sh): a shared library of an emulator and
/// kernels, named by GLMTUNE_EMU_KERNELS. What it has goes before what has the same name here, so that a test
/// runs on other kernels without being built again.
namespace emu {

constexpr int NO_SUCH_KERNEL = 2; // what emu_launch returns then

struct Substitute {
    decltype(&emu_launch) launch = nullptr;
    std::string problem;

    Substitute() {
        const char *path = getenv("GLMTUNE_EMU_KERNELS");
        if (!path || !*path) return;
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        void *found = library ? dlsym(library, "emu_launch") : nullptr;
        if (!found) problem = std::string("GLMTUNE_EMU_KERNELS: ") + dlerror();
        // In the library itself: its kernels are the ones.
        if (found != reinterpret_cast<void *>(&emu_launch)) launch = reinterpret_cast<decltype(launch)>(found);
    }
};

/// That of this process.
static const Substitute &substitute() {
    static const Substitute found;
    return found;
}

} // namespace emu
