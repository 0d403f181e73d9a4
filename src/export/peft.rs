//! Adapters as other programs read them: a PEFT folder that every version loads, or the folder of the official P-Tuning scripts.

use std::fmt;
use std::path::Path;

use crate::adapter::{self, Adapter};
use crate::error::{Error, Result};
use crate::model::tune::{self, Loaded, Strength};

/// What [`write()`] made.
#[derive(Debug, Clone, PartialEq)]
pub enum Written {
    /// A PEFT folder.
    Lora {
        /// How many adapters it is the sum of.
        adapters: usize,
        /// The rank of every linear.
        r: usize,
        /// How many linears carry it.
        linears: usize,
    },
    /// An official P-Tuning folder.
    Prefix {
        /// Its length.
        pre_seq_len: usize,
    },
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lora { adapters, r, linears } => {
                write!(f, "a PEFT adapter of r {r} on {linears} linears")?;
                match adapters {
                    1 => Ok(()),
                    n => write!(f, ", the sum of {n}"),
                }
            }
            Self::Prefix { pre_seq_len } => write!(
                f,
                "a P-Tuning v2 prefix of {pre_seq_len}, as the official scripts write it"
            ),
        }
    }
}

/// Writes the sum of `adapters` into the folder `dir`, as an adapter of `base` if one is given.
///
/// LoRA becomes a PEFT folder of classic keys: one rank, one alpha, no rsLoRA, no patterns, names as in files, the weights in F32 as
/// safetensors and as `.bin` (PEFT 0.3 reads nothing else). The product `s B A` of every linear stays: exactly where nothing but names
/// and layout change, to the rounding of F32 where adapters with other scales are added. DoRA is written as DoRA.
///
/// A prefix becomes `pytorch_model.bin` in F32 with the `config.json` of `base`, else its own.
///
/// # Errors
/// A folder is no adapter; a prefix is not alone or weighted; the sum cannot be an adapter (see [`adapter::add`]).
pub fn write(adapters: &[Strength], base: Option<&Path>, dir: &Path) -> Result<Written> {
    for strength in adapters {
        if !strength.factor.is_finite() {
            return Err(Error::input(
                "--adapter-scale",
                strength.factor,
                "a finite number",
                "use 0 to 1",
            ));
        }
        if matches!(tune::adapter_kind(strength.dir)?, Loaded::Prefix(_)) {
            if adapters.len() > 1 || strength.factor != 1.0 {
                let found = "a prefix of P-Tuning v2";
                let remedy =
                    "a prefix can be neither added nor scaled: export it alone, without --adapter-scale";
                return Err(Error::input(
                    strength.dir.display(),
                    found,
                    "a LoRA adapter",
                    remedy,
                ));
            }
            let kind = tune::rewrite_prefix(strength.dir, base, dir)?;
            return Ok(Written::Prefix {
                pre_seq_len: kind.pre_seq_len,
            });
        }
    }
    let read: Vec<Adapter> = adapters
        .iter()
        .map(|strength| Adapter::read(strength.dir))
        .collect::<Result<_>>()?;
    let mut sum = match read.as_slice() {
        [one] if adapters[0].factor == 1.0 => one.clone(),
        // Modules that trained whole stay as they are, as everywhere with one adapter.
        [one] => adapter::scale(one, adapters[0].factor)?,
        _ => {
            let weighted: Vec<(&Adapter, f64)> = read.iter().zip(adapters.iter().map(|s| s.factor)).collect();
            adapter::add(&weighted)?
        }
    };
    if let Some(base) = base {
        sum.config.base_model_name_or_path = Some(base.display().to_string());
    }
    let r = sum.write_classic(dir)?.r;
    Ok(Written::Lora {
        adapters: read.len(),
        r,
        linears: sum.updates.len(),
    })
}
