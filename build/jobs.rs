//! Compiler runs, each named by a hash of all it depends on: what has not changed is not compiled again, whatever the profile
//! and the features.

use std::collections::BTreeSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

/// One compiler run: `command` and, appended, the path of `output`.
pub struct Job {
    command: Command,
    pub output: PathBuf,
    logged: bool,
}

impl Job {
    /// A run that turns `source` (and what it includes from `folders`) into `<stem>.<hash>.<extension>`; `compiler` is the
    /// compiler's version.
    pub fn new(command: Command, compiler: &str, source: &Path, folders: &[&Path], extension: &str) -> Job {
        let mut hasher = DefaultHasher::new();
        compiler.hash(&mut hasher);
        command.get_program().hash(&mut hasher);
        command.get_args().for_each(|argument| argument.hash(&mut hasher));
        for file in with_includes(source, folders) {
            file.file_name().hash(&mut hasher);
            read(&file).hash(&mut hasher);
        }
        let output = named(source, &hasher, extension);
        Job {
            command,
            output,
            logged: false,
        }
    }

    /// What the compiler says goes to a file beside the output, instead of becoming warnings.
    pub fn with_log(mut self) -> Job {
        self.logged = true;
        self
    }

    /// That file.
    pub fn log(&self) -> PathBuf {
        self.output.with_extension("log")
    }

    fn run(&mut self) -> Result<(), String> {
        if reused(&self.output) && (!self.logged || reused(&self.log())) {
            return Ok(());
        }
        let partial = partial(&self.output);
        let run = self.command.arg("-o").arg(&partial).output();
        let run = run.map_err(|error| format!("cannot run {:?}: {error}", self.command.get_program()))?;
        let said = String::from_utf8_lossy(&run.stderr) + String::from_utf8_lossy(&run.stdout);
        if !run.status.success() {
            let words = std::iter::once(self.command.get_program()).chain(self.command.get_args());
            let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
            return Err(format!("{}: {}\n{said}", words.join(" "), run.status));
        }
        if self.logged {
            write(&self.log(), said.as_bytes());
        } else {
            said.lines().for_each(|line| println!("cargo:warning={line}"));
        }
        std::fs::rename(&partial, &self.output).map_err(|error| format!("{}: {error}", self.output.display()))
    }
}

/// Runs the jobs, as many at a time as cargo allows; ends the build at the first failure.
pub fn run(jobs: &mut [Job]) {
    let threads = std::env::var("NUM_JOBS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(1);
    let next = AtomicUsize::new(0);
    let jobs: Vec<Mutex<&mut Job>> = jobs.iter_mut().map(Mutex::new).collect();
    let failure = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(message) = job.lock().unwrap().run() {
                        next.store(jobs.len(), Ordering::Relaxed);
                        failure.lock().unwrap().get_or_insert(message);
                    }
                }
            });
        }
    });
    if let Some(message) = failure.into_inner().unwrap() {
        fail(&message);
    }
}

/// Ends the build with one message.
pub fn fail(message: &str) -> ! {
    eprintln!("error: {message}");
    std::process::exit(1);
}

/// The files of `folder` with this extension, sorted.
pub fn sources(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries =
        std::fs::read_dir(folder).unwrap_or_else(|error| fail(&format!("{}: {error}", folder.display())));
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut paths: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    paths.sort();
    paths
}

/// What `program --version` says.
pub fn version(program: &Path) -> String {
    match Command::new(program).arg("--version").output() {
        Ok(run) if run.status.success() => String::from_utf8_lossy(&run.stdout).into_owned(),
        Ok(run) => fail(&format!("{} --version: {}", program.display(), run.status)),
        Err(error) => fail(&format!("cannot run {}: {error}", program.display())),
    }
}

/// Is the file there from an earlier build? Then it stays for another while.
pub fn reused(path: &Path) -> bool {
    let file = std::fs::File::open(path);
    // Best effort: a file that is forgotten too early is made again.
    file.is_ok_and(|file| file.set_modified(SystemTime::now()).is_ok() || path.exists())
}

/// Deletes what no build has used for a week.
pub fn forget_unused() {
    for entry in std::fs::read_dir(folder()).into_iter().flatten().flatten() {
        let used = entry.metadata().and_then(|data| data.modified());
        let unused = used.ok().and_then(|time| time.elapsed().ok());
        if unused.is_some_and(|time| time > Duration::from_secs(7 * 24 * 3600)) {
            // Best effort: a file that stays costs only room.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Where the file made from `source` goes, `hasher` having seen all it depends on.
pub fn named(source: &Path, hasher: &DefaultHasher, extension: &str) -> PathBuf {
    let name = source.file_name().unwrap().to_str().unwrap();
    let stem = name.split('.').next().unwrap();
    folder().join(format!("{stem}.{:016x}.{extension}", hasher.finish()))
}

/// Where everything that is compiled goes: `target/kernels`, one place for every profile and every set of features.
fn folder() -> PathBuf {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap());
    // target/<profile>/build/<package>/out
    let folder = out.ancestors().nth(4).unwrap_or(&out).join("kernels");
    std::fs::create_dir_all(&folder).unwrap_or_else(|error| fail(&format!("{}: {error}", folder.display())));
    folder
}

/// The name of a file until it is whole: a build can be killed at any time, and two can run at once.
fn partial(path: &Path) -> PathBuf {
    path.with_added_extension(format!("{}.partial", std::process::id()))
}

/// `source` and every file that it includes with quotes, directly or not, from its own folder or from `folders`.
fn with_includes(source: &Path, folders: &[&Path]) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut open = vec![source.to_path_buf()];
    while let Some(file) = open.pop() {
        for line in read(&file).lines() {
            let name = line.trim_start().strip_prefix('#').map(str::trim_start);
            let name = name.and_then(|l| l.strip_prefix("include")).map(str::trim_start);
            let Some(name) = name.and_then(|l| l.strip_prefix('"')?.split('"').next()) else {
                continue;
            };
            let own = file.parent();
            let places = own.iter().chain(folders).map(|folder| folder.join(name));
            open.extend(places.filter(|path| path.is_file() && !found.contains(path)));
        }
        found.insert(file);
    }
    found
}

/// The text of a file.
pub fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| fail(&format!("{}: {error}", path.display())))
}

/// Writes a file.
pub fn write(path: &Path, bytes: &[u8]) {
    let partial = partial(path);
    std::fs::write(&partial, bytes)
        .and_then(|()| std::fs::rename(&partial, path))
        .unwrap_or_else(|error| fail(&format!("{}: {error}", path.display())));
}
