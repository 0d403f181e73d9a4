//! The tensors of an adapter: their names as PEFT writes them, their shapes, their partners.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{AdapterConfig, PEFT_PREFIX, say_once};
use crate::checkpoint::entry::place;
use crate::checkpoint::pickle::printable;
use crate::checkpoint::refuse_non_finite;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

const A: &str = "lora_A.weight";
const B: &str = "lora_B.weight";
/// What PEFT calls the magnitudes of DoRA.
const MAGNITUDE: &str = "lora_magnitude_vector";
/// A module that was saved whole, and the frozen original beside it, in memory.
const SAVED: &str = "modules_to_save";
const ORIGINAL: &str = "original_module";

/// What a tensor is called in a file of PEFT, and the segment of its name that tells in memory which adapter it is of.
enum Name {
    InFile(String),
    InMemory(String, String),
    /// Of the base.
    Original,
}

/// `lora_A.default.weight` is `lora_A.weight` in a file, `lm_head.modules_to_save.default.weight` is `lm_head.weight`.
fn in_file(name: &str) -> Name {
    let parts: Vec<&str> = name.split('.').collect();
    let joined = |parts: &[&str]| parts.join(".");
    let in_memory =
        |parts: &[&[&str]], adapter: &str| Name::InMemory(joined(&parts.concat()), adapter.to_string());
    if parts.contains(&ORIGINAL) {
        return Name::Original;
    }
    match parts.as_slice() {
        [stem @ .., part @ ("lora_A" | "lora_B"), adapter, "weight"] => {
            in_memory(&[stem, &[part, "weight"]], adapter)
        }
        [stem @ .., MAGNITUDE, "weight"] => Name::InFile(joined(&[stem, &[MAGNITUDE]].concat())),
        [stem @ .., MAGNITUDE, adapter] | [stem @ .., MAGNITUDE, adapter, "weight"] => {
            in_memory(&[stem, &[MAGNITUDE]], adapter)
        }
        [stem @ .., SAVED, adapter, part @ ("weight" | "bias")] => in_memory(&[stem, &[part]], adapter),
        _ => Name::InFile(name.to_string()),
    }
}

/// The tensors of `path` by the names that PEFT gives them in a file.
///
/// # Errors
/// There are tensors of two adapters, or one twice.
pub(super) fn in_file_names(
    path: &Path,
    tensors: BTreeMap<String, Tensor>,
) -> Result<BTreeMap<String, Tensor>> {
    let mut named = BTreeMap::new();
    let mut adapters: BTreeSet<String> = BTreeSet::new();
    let (mut renamed, mut originals) = (None, Vec::new());
    for (name, tensor) in tensors {
        let new = match in_file(&name) {
            Name::InFile(new) => new,
            Name::InMemory(new, adapter) => {
                adapters.insert(adapter);
                renamed.get_or_insert_with(|| printable(&name));
                new
            }
            Name::Original => {
                originals.push(printable(&name));
                continue;
            }
        };
        if adapters.len() > 1 {
            let found: Vec<String> = adapters.iter().map(|name| printable(name)).collect();
            let found = format!("tensors of the adapters {}", found.join(" and "));
            let remedy = "save one of them with save_pretrained(selected_adapters=[NAME])";
            return Err(Error::input(path.display(), found, "one adapter", remedy));
        }
        if named.insert(new, tensor).is_some() {
            let remedy = "the adapter was saved wrongly: save it again with save_pretrained";
            return Err(Error::input(
                place(path, &name),
                "it twice",
                "each tensor once",
                remedy,
            ));
        }
    }
    if let Some(name) = renamed {
        let adapter = adapters.first().map_or(String::new(), |name| printable(name));
        say_once(format!(
            "{}: tensors are named as in memory ({name}): read without `{adapter}`",
            path.display()
        ));
    }
    if let Some(first) = originals.first() {
        say_once(format!(
            "{}: {} tensors of the base beside modules that were saved whole are not used: {first}, ...",
            path.display(),
            originals.len()
        ));
    }
    Ok(named)
}

/// The linears that have tensors, named without PEFT's prefix.
pub(super) fn modules(tensors: &BTreeMap<String, Tensor>) -> BTreeSet<&str> {
    let stems = tensors.keys().filter_map(|name| stem(name, A));
    stems
        .map(|stem| stem.strip_prefix(PEFT_PREFIX).unwrap_or(stem))
        .collect()
}

/// Checks names, shapes, partners and numbers.
///
/// # Errors
/// As [`super::read_adapter`].
pub(super) fn check(path: &Path, config: &AdapterConfig, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let wrong = |name: &str, found: String, expected: String| {
        let remedy = "the adapter is damaged or of another kind";
        Err(Error::input(place(path, name), found, expected, remedy))
    };
    if tensors.is_empty() {
        let expected = "lora_A and lora_B of at least one linear";
        let remedy = "the adapter was saved wrongly: save it again";
        return Err(Error::input(
            path.display(),
            "no tensors at all",
            expected,
            remedy,
        ));
    }
    for (name, tensor) in tensors {
        let rank = |stem: &str| config.rank(stem.strip_prefix(PEFT_PREFIX).unwrap_or(stem));
        // What it goes with, its extents where they are known, and how they are called.
        let (partners, extents, shape) = if let Some(stem) = stem(name, A) {
            (
                vec![format!("{stem}.{B}")],
                vec![Some(rank(stem)), None],
                "[r, in]",
            )
        } else if let Some(stem) = stem(name, B) {
            let magnitude = config.use_dora.then(|| format!("{stem}.{MAGNITUDE}"));
            let partners = [format!("{stem}.{A}")].into_iter().chain(magnitude).collect();
            (partners, vec![None, Some(rank(stem))], "[out, r]")
        } else if let Some(stem) = stem(name, MAGNITUDE).filter(|_| config.use_dora) {
            (vec![format!("{stem}.{B}")], vec![None], "[out]")
        } else if is_saved(name, &config.modules_to_save) {
            // Its extents are those of the model's own.
            refuse_non_finite(&place(path, name), tensor)?;
            continue;
        } else {
            let mut expected = "names that end in lora_A.weight or lora_B.weight".to_string();
            if !config.modules_to_save.is_empty() {
                expected += &format!(", or of {}", config.modules_to_save.join(", "));
            }
            return wrong(name, "an unknown tensor".into(), expected);
        };
        let found = tensor.shape();
        let mut pairs = extents.iter().zip(found.extents());
        let fits = found.extents().len() == extents.len()
            && pairs.all(|(want, is)| want.is_none_or(|want| want == *is));
        if !fits || !tensor.dtype().is_float() {
            let r = extents
                .iter()
                .flatten()
                .next()
                .map_or(String::new(), |r| format!(" with r {r}"));
            return wrong(
                name,
                format!("{} {found}", tensor.dtype()),
                format!("floats {shape}{r}"),
            );
        }
        refuse_non_finite(&place(path, name), tensor)?;
        if let Some(partner) = partners.iter().find(|partner| !tensors.contains_key(*partner)) {
            return wrong(
                name,
                "it alone".into(),
                format!("its partner {}", printable(partner)),
            );
        }
    }
    Ok(())
}

/// The module that `name` is the part `part` of.
fn stem<'a>(name: &'a str, part: &str) -> Option<&'a str> {
    name.strip_suffix(part)?.strip_suffix('.')
}

/// Is `name` a tensor of a module whose name ends in one of `modules`?
fn is_saved(name: &str, modules: &[String]) -> bool {
    let module = name.rsplit_once('.').map_or("", |(module, _)| module);
    modules.iter().any(|saved| {
        let before = module.strip_suffix(saved.as_str());
        before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
    })
}
