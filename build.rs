//! Compiles the kernels in `cuda/`: for graphics cards (feature `cuda`: nvcc) or for the emulator (feature `emu`: g++).
//! Without either feature there is nothing to do, and neither compiler is needed.

#[cfg(feature = "cuda")]
#[path = "build/device.rs"]
mod device;
#[cfg(feature = "emu")]
#[path = "build/emulated.rs"]
mod emulated;
#[cfg(any(feature = "emu", feature = "cuda"))]
#[path = "build/jobs.rs"]
mod jobs;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(any(feature = "emu", feature = "cuda"))]
    {
        println!("cargo:rerun-if-changed=build");
        println!("cargo:rerun-if-changed=cuda");
        #[cfg(feature = "emu")]
        emulated::build();
        #[cfg(feature = "cuda")]
        device::build();
        jobs::forget_unused();
    }
}
