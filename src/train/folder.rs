//! The output folder of a run: whose it is, where to go on, what to replace.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use super::start::whole;
use super::state::{Checkpoints, RunState};
use super::{journal, result};
use crate::checkpoint::atomic;
use crate::config::RunConfig;
use crate::error::{Error, Result};

/// Files of a run beside its checkpoints; `--overwrite` removes these, `checkpoints` and `model`, and nothing else.
fn files() -> impl Iterator<Item = &'static str> {
    [&result::FILES[..], &journal::FILES, &["run.toml"]]
        .concat()
        .into_iter()
}

/// Replacing a folder must not remove what the new run is made from, nor a model or adapter that no run left there.
fn refuse_inputs(config: &RunConfig, dir: &Path) -> Result<()> {
    let Ok(place) = dir.canonicalize() else {
        return Ok(());
    };
    let mut inputs = vec![("--model", &config.model), ("--data", &config.data)];
    let optional = [
        ("--adapter", &config.adapter),
        ("--eval-data", &config.eval_data),
        ("--replay", &config.replay),
        ("--cache-dir", &config.cache_dir),
    ];
    inputs.extend(
        optional
            .into_iter()
            .filter_map(|(flag, path)| Some((flag, path.as_ref()?))),
    );
    inputs.extend(
        config
            .merge_adapters
            .iter()
            .map(|path| ("--merge-adapters", path)),
    );
    for (flag, path) in inputs {
        let Ok(path) = path.canonicalize() else { continue };
        let replaced = ["checkpoints", result::MODEL]
            .iter()
            .any(|part| path.starts_with(place.join(part)));
        let file = path.parent() == Some(&place) && files().any(|name| path.ends_with(name));
        if path == place || replaced || file {
            return Err(Error::input(
                dir.display(),
                format!("{flag} {} in what --overwrite replaces", path.display()),
                "inputs that stay",
                "give --output another name",
            ));
        }
    }
    let earlier = dir.join("run.toml").exists();
    let foreign = [
        "config.json",
        "pytorch_model.bin",
        "model.safetensors",
        "adapter_config.json",
    ]
    .into_iter()
    .find(|name| !earlier && dir.join(name).exists());
    match foreign {
        None => Ok(()),
        Some(name) => Err(Error::input(
            dir.join(name).display(),
            "a model or an adapter that is not of a run",
            "the folder of an earlier run",
            "give --output another name",
        )),
    }
}

/// The output folder.
#[derive(Debug)]
pub struct RunFolder {
    dir: PathBuf,
    checkpoints: Checkpoints,
    resume: bool,
    /// Held while the run writes: the folder itself, open.
    lock: Option<File>,
}

impl RunFolder {
    /// Looks before anything is loaded: a new or empty folder for a new run, a checkpoint for one that goes on. Changes
    /// nothing.
    ///
    /// # Errors
    /// The folder holds something and neither `--resume` nor `--overwrite` was given; there is nothing to resume.
    pub fn check(config: &RunConfig) -> Result<Self> {
        let dir = config.output.clone();
        let checkpoints = Checkpoints::new(&dir, config.save_total_limit);
        if dir.exists() && !dir.is_dir() {
            let remedy = "give --output another name";
            return Err(Error::input(dir.display(), "a file", "a folder", remedy));
        }
        if config.resume {
            if checkpoints.list()?.is_empty() {
                let remedy =
                    "start the run without --resume (--overwrite if the folder holds an earlier one)";
                return Err(Error::input(
                    dir.display(),
                    "no checkpoint",
                    "a run to resume",
                    remedy,
                ));
            }
        } else if config.overwrite {
            refuse_inputs(config, &dir)?;
        } else if dir.is_dir() {
            let mut entries = fs::read_dir(&dir).map_err(Error::io(&dir, "read"))?;
            if entries.next().is_some() {
                return Err(Error::input(
                    dir.display(),
                    "a folder that is not empty",
                    "a new or empty folder",
                    "--resume continues the run in it, --overwrite replaces it",
                ));
            }
        }
        Ok(Self {
            dir,
            checkpoints,
            resume: config.resume,
            lock: None,
        })
    }

    /// The checkpoint to go on from, after it was compared with `state`; `None` for a new run.
    ///
    /// # Errors
    /// Data, base or configuration are not those of the checkpoint.
    pub fn resume_from(&self, state: &RunState) -> Result<Option<PathBuf>> {
        if !self.resume {
            return Ok(None);
        }
        let Some((_, newest)) = self.checkpoints.list()?.pop() else {
            return Ok(None);
        };
        whole(&newest, RunState::read(&newest))?.check_continues_as(state, &newest)?;
        Ok(Some(newest))
    }

    /// Begins writing, when nothing else can go wrong: of a new run, everything of an earlier one is removed; `run.toml`
    /// is written.
    ///
    /// # Errors
    /// The folder cannot be changed; another process is writing it.
    pub fn begin(&mut self, config: &RunConfig) -> Result<()> {
        fs::create_dir_all(&self.dir).map_err(Error::io(&self.dir, "create"))?;
        self.lock()?;
        self.remove_half_written()?;
        if !self.resume {
            // `run.toml` says that all this is of an earlier run: it goes last.
            self.checkpoints.clear()?;
            let model = self.dir.join(result::MODEL);
            if self.dir.join("run.toml").exists() && model.join("config.json").exists() {
                fs::remove_dir_all(&model).map_err(Error::io(&model, "remove"))?;
            }
            for name in files() {
                let path = self.dir.join(name);
                if path.exists() {
                    fs::remove_file(&path).map_err(Error::io(&path, "remove"))?;
                }
            }
        }
        atomic::write(&self.dir.join("run.toml"), config.to_toml().as_bytes())
    }

    /// Removes what a kill in the middle of a write left beside the files of the run.
    fn remove_half_written(&self) -> Result<()> {
        for entry in fs::read_dir(&self.dir).map_err(Error::io(&self.dir, "read"))? {
            let path = entry.map_err(Error::io(&self.dir, "read"))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let temporary = name.starts_with('.') && name.ends_with(".tmp");
            if temporary && files().any(|file| name[1..].starts_with(file)) {
                fs::remove_file(&path).map_err(Error::io(&path, "remove"))?;
            }
        }
        Ok(())
    }

    /// Two runs in one folder would remove each other's files.
    fn lock(&mut self) -> Result<()> {
        // Where folders cannot be opened or locked: rather unguarded than not at all.
        let Ok(folder) = File::open(&self.dir) else {
            return Ok(());
        };
        if let Err(TryLockError::WouldBlock) = folder.try_lock() {
            return Err(Error::input(
                self.dir.display(),
                "another glmtune that is writing it",
                "one writer",
                "give --output another name, or wait until that one is done",
            ));
        }
        self.lock = Some(folder);
        Ok(())
    }

    /// The folder itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its checkpoints.
    pub fn checkpoints(&self) -> &Checkpoints {
        &self.checkpoints
    }
}
