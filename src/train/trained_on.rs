//! On which weights an adapter was trained.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Checkpoints, RunState};
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::model::Weights;
use crate::quant::QuantType;

/// The file beside an adapter that was made of others.
pub const NOTE: &str = "trained_on.json";

/// Its contents.
#[derive(Serialize, Deserialize)]
struct Note {
    four_bits: bool,
    pissa: bool,
    quant_type: String,
    double_quant: bool,
    merged: Vec<PathBuf>,
    base: Option<String>,
}

/// What the `run.toml` beside an adapter says about the base weights it was trained on.
#[derive(Debug, Clone)]
pub struct TrainedOn {
    /// Were the linears held in 4 bits?
    pub four_bits: bool,
    /// Did the adapter start with PiSSA? Its linears in 4 bits then were not those of the base, and the adapter as it was saved
    /// goes with the dense base.
    pub pissa: bool,
    /// The code.
    pub quant_type: QuantType,
    /// Were block scales quantised too?
    pub double_quant: bool,
    /// Where the run kept its 4-bit copy of the base, if not in the base's folder.
    pub cache_dir: Option<PathBuf>,
    /// Adapters that were merged into the base before.
    pub merged: Vec<PathBuf>,
    /// The fingerprint of the base weights, where a checkpoint of the run still tells it.
    pub base: Option<String>,
}

impl Default for TrainedOn {
    /// Adapters of other programs have no `run.toml`: weights as stored, and NF4 with double quantisation if asked for.
    fn default() -> Self {
        Self {
            four_bits: false,
            pissa: false,
            quant_type: QuantType::Nf4,
            double_quant: true,
            cache_dir: None,
            merged: Vec::new(),
            base: None,
        }
    }
}

impl TrainedOn {
    /// Looks beside the adapter of a run, or above the `checkpoints` that it is one of.
    ///
    /// # Errors
    /// There is a `run.toml` that cannot be read.
    pub fn read(adapter: &Path) -> Result<Self> {
        Ok(Self::find(adapter)?.unwrap_or_default())
    }

    /// [`TrainedOn::read`], and nothing of an adapter without a `run.toml`.
    ///
    /// # Errors
    /// As [`TrainedOn::read`].
    pub fn find(adapter: &Path) -> Result<Option<Self>> {
        // A link, or a name without a folder before it, has no parent to look at.
        let whole = adapter.canonicalize();
        let whole = whole.as_deref().unwrap_or(adapter);
        let checkpoints = whole.parent().filter(|dir| dir.ends_with("checkpoints"));
        let places = [Some(adapter), checkpoints.and_then(Path::parent)];
        let mut paths = places.into_iter().flatten().map(|dir| dir.join("run.toml"));
        let Some(path) = paths.find(|path| path.exists()) else {
            return Self::read_note(adapter);
        };
        let newest = Checkpoints::new(adapter, 1)
            .list()
            .ok()
            .and_then(|mut all| all.pop());
        let checkpoint = newest.map_or_else(|| adapter.to_path_buf(), |(_, place)| place);
        let run = RunConfig::read(&path)?;
        Ok(Some(Self {
            four_bits: run.in_four_bits(),
            pissa: run.lora_init.starts_with("pissa"),
            quant_type: if run.quant_type == "fp4" {
                QuantType::Fp4
            } else {
                QuantType::Nf4
            },
            double_quant: !run.no_double_quant,
            cache_dir: run.cache_dir,
            merged: run.merge_adapters,
            // Only for a warning: a state that cannot be read is no reason to stop.
            base: RunState::read(&checkpoint).ok().map(|state| state.base),
        }))
    }

    /// Of an adapter that was made of others: what [`TrainedOn::write_note`] left beside it.
    fn read_note(adapter: &Path) -> Result<Option<Self>> {
        let path = adapter.join(NOTE);
        if !path.exists() {
            return Ok(None);
        }
        let text = std::fs::read(&path).map_err(Error::io(&path, "read"))?;
        let note: Note = serde_json::from_slice(&text).map_err(|e| {
            let remedy = "make the adapter again, or delete the file and say --into";
            Error::input(path.display(), e, "what glmtune writes", remedy)
        })?;
        Ok(Some(Self {
            four_bits: note.four_bits,
            pissa: note.pissa,
            quant_type: match note.quant_type.as_str() {
                "fp4" => QuantType::Fp4,
                _ => QuantType::Nf4,
            },
            double_quant: note.double_quant,
            cache_dir: None,
            merged: note.merged,
            base: note.base,
        }))
    }

    /// Writes into the adapter folder `dir` what its adapter was trained on, for adapters that have no `run.toml` of their own.
    ///
    /// # Errors
    /// The system refuses to write.
    pub fn write_note(&self, dir: &Path) -> Result<()> {
        let note = Note {
            four_bits: self.four_bits,
            pissa: self.pissa,
            quant_type: self.quant_type.name().to_string(),
            double_quant: self.double_quant,
            merged: self.merged.clone(),
            base: self.base.clone(),
        };
        let text = serde_json::to_string_pretty(&note).expect("strings and flags are JSON");
        crate::checkpoint::atomic::write(&dir.join(NOTE), format!("{text}\n").as_bytes())
    }

    /// Was the same base held in the same way?
    pub fn is_of_same_base(&self, other: &Self) -> bool {
        let known = |a: &Option<String>, b: &Option<String>| a.is_none() || b.is_none() || a == b;
        self.weights() == other.weights()
            && self.pissa == other.pissa
            && self.merged == other.merged
            && known(&self.base, &other.base)
    }

    /// In which form the linears of the base were held.
    pub fn weights(&self) -> Weights {
        match self.four_bits {
            true => Weights::Quantized {
                quant_type: self.quant_type,
                double_quant: self.double_quant,
            },
            false => Weights::AsStored,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_says_on_which_weights_it_was_trained() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!TrainedOn::read(dir.path()).unwrap().four_bits);
        std::fs::write(
            dir.path().join("run.toml"),
            "method = 'qlora'\nquant_type = 'fp4'\nno_double_quant = true\n",
        )
        .unwrap();
        let run = TrainedOn::read(dir.path()).unwrap();
        assert!(run.four_bits && run.quant_type == QuantType::Fp4 && !run.double_quant);
        let held = Weights::Quantized {
            quant_type: QuantType::Fp4,
            double_quant: false,
        };
        assert_eq!(run.weights(), held);
        std::fs::write(dir.path().join("run.toml"), "method = 'lora'\n").unwrap();
        assert_eq!(TrainedOn::read(dir.path()).unwrap().weights(), Weights::AsStored);
        let note = tempfile::tempdir().unwrap();
        assert!(TrainedOn::find(note.path()).unwrap().is_none());
        run.write_note(note.path()).unwrap();
        let read = TrainedOn::find(note.path()).unwrap().unwrap();
        assert!(read.weights() == held && read.is_of_same_base(&run));
        assert!(!read.is_of_same_base(&TrainedOn::default()));
        std::fs::write(dir.path().join("run.toml"), "method = ").unwrap();
        assert!(TrainedOn::read(dir.path()).is_err_and(|e| e.to_string().contains("run.toml")));
    }
}
