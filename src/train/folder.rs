//! The output folder of a run: whose it is, where to go on, what to replace.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use super::run::whole;
use super::state::{Checkpoints, RunState};
use crate::checkpoint::atomic;
use crate::config::RunConfig;
use crate::error::{Error, Result};

/// Files of a run beside its checkpoints; `--overwrite` removes these and nothing else.
const FILES: [&str; 4] = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "metrics.jsonl",
    "run.toml",
];

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
        } else if !config.overwrite && dir.is_dir() {
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
        if !self.resume {
            self.checkpoints.clear()?;
            for name in FILES {
                let path = self.dir.join(name);
                if path.exists() {
                    fs::remove_file(&path).map_err(Error::io(&path, "remove"))?;
                }
            }
        }
        atomic::write(&self.dir.join("run.toml"), config.to_toml().as_bytes())
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
