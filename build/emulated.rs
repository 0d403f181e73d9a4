//! The kernels for the emulator: every `cuda/*.cu` as it is, compiled by g++ together with `cuda/emu/*.cpp`.
//!
//! `GLMTUNE_EMU_CHECK=1` builds it with the checker of shared memory (`cuda/emu/check.h`): four times slower, it reports races,
//! reads of what was never written, and accesses outside.

use std::path::{Path, PathBuf};

use crate::jobs::{self, Job};

/// Compiles and links everything.
pub fn build() {
    let folders = [Path::new("cuda"), Path::new("cuda/emu")];
    let mut compiler = cc::Build::new();
    compiler
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .debug(false)
        .define("GLM_EMULATOR", None)
        .includes(folders)
        // The same bits with and without -march: what is fused is written as fmaf.
        .flag("-ffp-contract=off")
        .flag("-Wno-unknown-pragmas");
    println!("cargo:rerun-if-env-changed=GLMTUNE_EMU_CHECK");
    let checked = std::env::var_os("GLMTUNE_EMU_CHECK").is_some_and(|value| value == "1");
    if checked {
        // Lines for its reports.
        compiler.define("EMU_CHECK", None).debug(true);
    }
    let tool = compiler.try_get_compiler().unwrap_or_else(|error| {
        jobs::fail(&format!(
            "feature `emu` needs a C++17 compiler such as g++ (apt install g++): {error}"
        ))
    });
    let version = jobs::version(tool.path());
    let mut sources = jobs::sources(folders[0], "cu");
    sources.extend(jobs::sources(folders[1], "cpp"));
    let mut objects: Vec<Job> = sources
        .iter()
        .map(|source| {
            let mut command = tool.to_command();
            command.args(["-c", "-x", "c++"]).arg(source);
            if checked && source.extension().is_some_and(|extension| extension == "cu") {
                // The calls that this makes the compiler insert are defined by check.h; libtsan is not linked.
                command.args([
                    "-fsanitize=thread",
                    "--param",
                    "tsan-instrument-func-entry-exit=0",
                ]);
            }
            Job::new(command, &version, source, &folders, "o")
        })
        .collect();
    if objects.is_empty() {
        return;
    }
    jobs::run(&mut objects);

    let objects: Vec<PathBuf> = objects.into_iter().map(|job| job.output).collect();
    // Whole: nothing refers to a kernel but the static object that registers it.
    compiler
        .link_lib_modifier("+whole-archive")
        .objects(&objects)
        .compile("glmtune_emulated");
}
