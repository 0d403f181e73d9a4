//! The kernels for graphics cards: nvcc makes PTX once per virtual architecture, ptxas a cubin per real one. Both are
//! embedded by a generated `kernels.rs`, deflated (to a quarter), apart from each other, so that an old driver meets
//! nothing it cannot read.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write;
use std::hash::Hash;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::jobs::{self, Job};

/// Real architectures, and the virtual one that each is made from.
const TARGETS: [(u32, u32); 6] = [(75, 75), (80, 80), (86, 80), (89, 80), (90, 80), (120, 80)];

/// The version of PTX that driver 525 reads. nvcc labels PTX with its own, newer version whatever it uses of it; ptxas stops
/// at an instruction that is too new for the label, so a wrong label cannot pass.
const PTX_VERSION: &str = ".version 8.0";

const FETCH: &str = "run: bash scripts/fetch-nvcc.sh";

/// Compiles everything; writes `kernels.rs`, and `kernels.list` for scripts/static-report.
pub fn build() {
    for name in [
        "NVCC",
        "CUDA_HOME",
        "CUDA_PATH",
        "GLMTUNE_PTXAS",
        "GLMTUNE_CUDA_ARCHS",
    ] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let nvcc = find_nvcc();
    let ptxas = find_ptxas(&nvcc);
    let (nvcc_version, ptxas_version) = (jobs::version(&nvcc), jobs::version(&ptxas));
    if release(&nvcc_version) < (12, 0) {
        jobs::fail(&format!("{} is older than 12.0; {FETCH}", nvcc.display()));
    }
    let targets = targets(release(&ptxas_version));
    let mut bases: Vec<u32> = targets.iter().map(|(_, base)| *base).collect();
    bases.dedup();

    let sources = jobs::sources(Path::new("cuda"), "cu");
    let mut translations = Vec::new();
    for source in &sources {
        for base in &bases {
            let mut command = Command::new(&nvcc);
            command.args([
                "-std=c++17",
                "--ptx",
                &format!("-arch=compute_{base}"),
                "-I",
                "cuda",
            ]);
            if *base == 75 {
                // Neither bf16 nor cp.async, and mma only in its smaller shape.
                command.arg("-DGLM_SM75");
            }
            command.arg(source);
            translations.push(Job::new(
                command,
                &nvcc_version,
                source,
                &[Path::new("cuda")],
                "ptx",
            ));
        }
    }
    jobs::run(&mut translations);
    let ptx: Vec<PathBuf> = translations.iter().map(|job| relabelled(&job.output)).collect();

    let mut assemblies = Vec::new();
    for files in ptx.chunks(bases.len().max(1)) {
        for (target, base) in &targets {
            let file = &files[bases.iter().position(|b| b == base).unwrap()];
            let mut command = Command::new(&ptxas);
            command.args(["-v", &format!("-arch=sm_{target}")]).arg(file);
            let job = Job::new(command, &ptxas_version, file, &[], &format!("sm_{target}.cubin"));
            assemblies.push(job.with_log());
        }
    }
    jobs::run(&mut assemblies);
    let cubins: Vec<PathBuf> = assemblies.iter().map(|job| job.output.clone()).collect();

    let packed: Vec<PathBuf> = ptx.iter().chain(&cubins).map(|file| deflated(file)).collect();
    let (packed_ptx, packed_cubins) = packed.split_at(ptx.len());
    write_table(&sources, &bases, &ptx, packed_ptx, &targets, packed_cubins);
    let list: String = ptx
        .iter()
        .chain(&cubins)
        .flat_map(|file| [file.to_str().unwrap(), "\n"])
        .collect();
    jobs::write(&out("kernels.list"), list.as_bytes());
}

/// A file that belongs to this build alone.
fn out(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os("OUT_DIR").unwrap()).join(name)
}

/// `static UNITS`: per source file its kernels' names, PTX and cubins.
fn write_table(
    sources: &[PathBuf],
    bases: &[u32],
    ptx: &[PathBuf],
    packed_ptx: &[PathBuf],
    targets: &[(u32, u32)],
    packed_cubins: &[PathBuf],
) {
    let mut table = String::from("pub(super) static UNITS: &[Unit] = &[\n");
    for (i, source) in sources.iter().enumerate() {
        let stem = source.file_stem().unwrap();
        writeln!(table, "    Unit {{\n        name: {stem:?},\n        cubins: &[").unwrap();
        for (j, (target, _)) in targets.iter().enumerate() {
            let cubin = &packed_cubins[i * targets.len() + j];
            writeln!(table, "            ({target}, include_bytes!({cubin:?})),").unwrap();
        }
        writeln!(table, "        ],\n        ptx: &[").unwrap();
        for (j, base) in bases.iter().enumerate() {
            let at = i * bases.len() + j;
            let (text, kernels) = (&packed_ptx[at], entries(&ptx[at]));
            writeln!(
                table,
                "            ({base}, include_bytes!({text:?}), &{kernels:?}),"
            )
            .unwrap();
        }
        writeln!(table, "        ],\n    }},").unwrap();
    }
    table.push_str("];\n");
    jobs::write(&out("kernels.rs"), table.as_bytes());
}

/// The file `path.z`, made once: names of compiled files change with their contents.
fn deflated(path: &Path) -> PathBuf {
    let packed = path.with_added_extension("z");
    if !jobs::reused(&packed) {
        let bytes = std::fs::read(path).unwrap_or_else(|e| jobs::fail(&format!("{}: {e}", path.display())));
        jobs::write(&packed, &miniz_oxide::deflate::compress_to_vec(&bytes, 7));
    }
    packed
}

/// The names of the kernels in a PTX file.
fn entries(ptx: &Path) -> Vec<String> {
    let text = jobs::read(ptx);
    let entries = text
        .lines()
        .filter_map(|line| line.strip_prefix(".visible .entry "));
    entries
        .map(|line| line.trim_end_matches('(').to_owned())
        .collect()
}

/// A copy of a PTX file under the label that we support, without the one hint (which bytes of a load are used) that is newer.
fn relabelled(ptx: &Path) -> PathBuf {
    let mut text = String::new();
    for line in jobs::read(ptx).lines() {
        if !line.trim_start().starts_with(".pragma \"used_bytes_mask") {
            let line = if line.starts_with(".version ") {
                PTX_VERSION
            } else {
                line
            };
            text.extend([line, "\n"]);
        }
    }
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let path = jobs::named(ptx, &hasher, "relabelled.ptx");
    if !jobs::reused(&path) {
        jobs::write(&path, text.as_bytes());
    }
    path
}

/// The targets asked for by `GLMTUNE_CUDA_ARCHS` ("80,90"; default: all) that this ptxas knows.
fn targets(ptxas: (u32, u32)) -> Vec<(u32, u32)> {
    let wanted = std::env::var("GLMTUNE_CUDA_ARCHS").unwrap_or_default();
    let wanted: Vec<u32> = wanted
        .split(',')
        .map(str::trim)
        .filter(|word| !word.is_empty())
        .map(|word| match word.parse() {
            Ok(arch) if TARGETS.iter().any(|(target, _)| *target == arch) => arch,
            _ => jobs::fail(&format!(
                "GLMTUNE_CUDA_ARCHS: found {word:?}, expected some of 75,80,86,89,90,120"
            )),
        })
        .collect();
    let mut targets = TARGETS.to_vec();
    targets.retain(|(target, _)| wanted.is_empty() || wanted.contains(target));
    if ptxas < (12, 8) && targets.iter().any(|(target, _)| *target == 120) {
        println!("cargo:warning=this ptxas does not know sm_120: such cards will translate the PTX; {FETCH}");
        targets.retain(|(target, _)| *target != 120);
    }
    targets
}

fn find_nvcc() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(nvcc) = variable("NVCC") {
        return nvcc.into();
    }
    let path = variable("PATH").unwrap_or_default();
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable);
    let folders = homes
        .map(|home| PathBuf::from(home).join("bin"))
        .chain(std::env::split_paths(&path));
    let known = ["/usr/local/cuda/bin", ".toolchain/cuda-13.0/nvidia/cu13/bin"].map(PathBuf::from);
    folders
        .chain(known)
        .map(|folder| folder.join("nvcc"))
        .find(|nvcc| nvcc.is_file())
        .unwrap_or_else(|| {
            jobs::fail(&format!("feature `cuda` needs nvcc: none in NVCC, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda; {FETCH}"))
        })
}

/// ptxas 12.9 where it was fetched: its cubins load from driver 525 on, those of 13.0 only from 580 on.
fn find_ptxas(nvcc: &Path) -> PathBuf {
    let chosen = std::env::var_os("GLMTUNE_PTXAS")
        .filter(|value| !value.is_empty())
        .map(PathBuf::from);
    let fetched = PathBuf::from(".toolchain/ptxas-12.9/nvidia/cuda_nvcc/bin/ptxas");
    let sibling = std::fs::canonicalize(nvcc)
        .unwrap_or_else(|_| nvcc.to_path_buf())
        .with_file_name("ptxas");
    let found = chosen.or_else(|| [fetched, sibling].into_iter().find(|path| path.is_file()));
    found.unwrap_or_else(|| jobs::fail(&format!("no ptxas beside {}; {FETCH}", nvcc.display())))
}

/// The release that `--version` names: "..., release 13.0, V13.0.88".
fn release(version: &str) -> (u32, u32) {
    let numbers = version
        .split("release ")
        .nth(1)
        .and_then(|rest| rest.split(',').next())
        .unwrap_or_default();
    let mut numbers = numbers.split('.').map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}
