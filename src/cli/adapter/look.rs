//! `glmtune adapter inspect` and `diff`.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::chart::{Chart, figure};
use super::{DiffArgs, InspectArgs, open, short};
use crate::adapter::{self, Adapter, Difference, Norms, Update};
use crate::checkpoint::{Checkpoint, Source};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// One linear of an adapter.
struct Row<'a> {
    module: &'a str,
    update: &'a Update,
    norms: Norms,
    /// `|W|` of the base, and how far the adapter moves it: `|s B A|`, with DoRA of the new weight less the old.
    base: Option<(f64, f64)>,
}

pub(super) fn inspect(args: &InspectArgs) -> Result<()> {
    let adapter = open(&args.adapter)?;
    let base = args.model.as_ref().map(|dir| Checkpoint::open(dir)).transpose()?;
    let measured: Vec<(&str, &Update, Norms)> = adapter::in_order(&adapter)
        .into_par_iter()
        .map(|(module, update)| Ok((module, update, adapter::norms(update)?)))
        .collect::<Result<_>>()?;
    let mut rows = Vec::with_capacity(measured.len());
    for (module, update, norms) in measured {
        // One weight at a time: a model is larger than memory may be.
        let base = base
            .as_ref()
            .map(|base| against(base, &adapter, module, update, norms.frobenius));
        rows.push(Row {
            module,
            update,
            norms,
            base: base.transpose()?,
        });
    }
    let saved = saved(&adapter, base.as_ref())?;
    match args.json {
        true => println!("{:#}", json(&adapter, &rows, &saved)),
        false => print(&adapter, &rows, &saved),
    }
    Ok(())
}

/// A tensor of a module that trained whole: name, extents, norm, and the distance from the base's where that has its shape.
type Saved = (String, String, f64, Option<f64>);

/// `|W|`, and how far the adapter moves W.
fn against(
    base: &Checkpoint,
    adapter: &Adapter,
    module: &str,
    update: &Update,
    norm: f64,
) -> Result<(f64, f64)> {
    let name = format!("{module}.weight");
    let weight = Source::dense(base, &name)?;
    let (out, input) = update.extents();
    if weight.shape().extents() != [out, input] {
        let place = format!("{}: {}", adapter.dir.display(), module.escape_debug());
        let found = format!("an update of a weight [{out}, {input}]");
        let expected = format!("{}, as {}", weight.shape(), base.place(&name));
        let remedy = "this adapter belongs to another base model: give --model the base it was trained on";
        return Err(Error::input(place, found, expected, remedy));
    }
    let size = adapter::norm(&weight);
    match update.magnitude {
        None => Ok((size, norm)),
        Some(_) => Ok((size, adapter::dora_change(update, &weight)?)),
    }
}

/// Modules that trained whole.
fn saved(adapter: &Adapter, base: Option<&Checkpoint>) -> Result<Vec<Saved>> {
    let mut saved = Vec::new();
    for (name, tensor) in &adapter.saved {
        let distance = match base {
            Some(base) => {
                // A tied head may have no tensor of its own.
                let name = match name == crate::checkpoint::LM_HEAD && !base.contains(name) {
                    true => crate::checkpoint::WORD_EMBEDDINGS,
                    false => name.as_str(),
                };
                let weight = Source::dense(base, name)?;
                (weight.shape() == tensor.shape()).then(|| adapter::distance(&weight, tensor))
            }
            None => None,
        };
        let shown = name.escape_debug().to_string();
        saved.push((shown, tensor.shape().to_string(), adapter::norm(tensor), distance));
    }
    Ok(saved)
}

/// The norm of each layer's updates together.
fn by_layer<'a>(values: impl Iterator<Item = (&'a str, f64)>) -> BTreeMap<usize, f64> {
    let mut squares: BTreeMap<usize, f64> = BTreeMap::new();
    for (module, value) in values {
        if let Some(layer) = adapter::layer_of(module) {
            *squares.entry(layer).or_default() += value * value;
        }
    }
    squares
        .into_iter()
        .map(|(layer, square)| (layer, square.sqrt()))
        .collect()
}

fn words(adapter: &Adapter) -> String {
    let c = &adapter.config;
    let kind = match (c.use_dora, c.use_rslora) {
        (true, _) => "DoRA",
        (false, true) => "rsLoRA",
        (false, false) => "LoRA",
    };
    let patterns = match c.rank_pattern.is_empty() && c.alpha_pattern.is_empty() {
        true => "",
        false => " (and patterns)",
    };
    format!(
        "{kind} r {}, alpha {}{patterns}, {}",
        c.r,
        c.lora_alpha,
        c.targets_in_words()
    )
}

fn print(adapter: &Adapter, rows: &[Row], saved: &[Saved]) {
    println!("{}: {}", adapter.dir.display(), words(adapter));
    let relative = rows.iter().any(|row| row.base.is_some());
    let width = rows
        .iter()
        .map(|row| short(row.module).len())
        .max()
        .unwrap_or(0)
        .max(12);
    let last = if relative { "   change/|W|" } else { "" };
    println!(
        "{:<width$}   rank     scale     |sBA|  spectral  eff. rank{last}",
        "layer module"
    );
    for row in rows {
        let part = row
            .base
            .map_or(String::new(), |(w, change)| format!("   {}", figure(change / w)));
        println!(
            "{:<width$}  {:>5} {} {} {}  {:>9.2}{part}",
            short(row.module),
            row.update.rank(),
            figure(row.update.scale),
            figure(row.norms.frobenius),
            figure(row.norms.spectral),
            row.norms.effective_rank,
        );
    }
    let total = adapter::root_of_squares(rows.iter().map(|row| row.norms.frobenius));
    print!("{:<width$}  {:>5} {:>9} {}", "all", "", "", figure(total));
    if relative {
        let weights = adapter::root_of_squares(rows.iter().filter_map(|row| Some(row.base?.0)));
        let change = adapter::root_of_squares(rows.iter().filter_map(|row| Some(row.base?.1)));
        print!(" {:>9}  {:>9}   {}", "", "", figure(change / weights));
    }
    println!();
    if adapter.config.use_dora {
        println!(
            "DoRA: |sBA| is that of the directions; magnitudes come on top (--model tells the whole change)"
        );
    }
    for (name, shape, norm, distance) in saved {
        let distance = match distance {
            Some(distance) => format!(", {} away from the base's", figure(*distance).trim()),
            None if relative => ", of another shape than the base's".into(),
            None => String::new(),
        };
        println!(
            "{name} {shape} replaces the base's: norm {}{distance}",
            figure(*norm).trim()
        );
    }
    let untrained = rows.iter().filter(|row| row.norms.frobenius == 0.0).count();
    if untrained > 0 {
        println!(
            "warning: {untrained} of {} updates are zero: these linears were not trained",
            rows.len()
        );
    }
    let layers = by_layer(rows.iter().map(|row| (row.module, row.norms.frobenius)));
    if !layers.is_empty() {
        println!("\n|sBA| of each layer");
        let rows: Vec<(String, f64)> = layers
            .into_iter()
            .map(|(layer, norm)| (layer.to_string(), norm))
            .collect();
        Chart::for_output()
            .lines(&rows)
            .iter()
            .for_each(|line| println!("{line}"));
    }
}

fn json(adapter: &Adapter, rows: &[Row], saved: &[Saved]) -> Value {
    let c = &adapter.config;
    let modules: Vec<Value> = rows
        .iter()
        .map(|row| {
            let mut value = json!({
                "module": row.module,
                "rank": row.update.rank(),
                "scale": row.update.scale,
                "frobenius": row.norms.frobenius,
                "spectral": row.norms.spectral,
                "effective_rank": row.norms.effective_rank,
            });
            if let Some((weight, change)) = row.base {
                value["weight"] = json!(weight);
                value["change"] = json!(change);
                value["relative"] = json!(change / weight);
            }
            value
        })
        .collect();
    let layers = by_layer(rows.iter().map(|row| (row.module, row.norms.frobenius)));
    let layers: Map<String, Value> = layers
        .into_iter()
        .map(|(layer, norm)| (layer.to_string(), json!(norm)))
        .collect();
    let saved: Vec<Value> = saved
        .iter()
        .map(|(name, shape, norm, distance)| json!({ "name": name, "shape": shape, "frobenius": norm, "distance": distance }))
        .collect();
    json!({
        "path": adapter.dir.display().to_string(),
        "r": c.r,
        "lora_alpha": c.lora_alpha,
        "use_rslora": c.use_rslora,
        "use_dora": c.use_dora,
        "target_modules": c.target_modules,
        "frobenius": adapter::root_of_squares(rows.iter().map(|row| row.norms.frobenius)),
        "modules": modules,
        "layers": layers,
        "modules_to_save": saved,
    })
}

pub(super) fn diff(args: &DiffArgs) -> Result<()> {
    let (first, second) = (open(&args.first)?, open(&args.second)?);
    let mut modules: Vec<&str> = adapter::in_order(&first)
        .into_iter()
        .map(|(module, _)| module)
        .collect();
    let only_second = adapter::in_order(&second).into_iter().map(|(module, _)| module);
    modules.extend(only_second.filter(|module| !first.updates.contains_key(*module)));
    let rows: Vec<(&str, Difference)> = modules
        .par_iter()
        .map(|&module| {
            let (a, b) = (first.updates.get(module), second.updates.get(module));
            if let (Some(a), Some(b)) = (a, b)
                && a.extents() != b.extents()
            {
                let place = format!("{}: {}", second.dir.display(), module.escape_debug());
                let found = format!("a weight of {:?}", b.extents());
                let expected = format!("one of {:?}, as in {}", a.extents(), first.dir.display());
                return Err(Error::input(
                    place,
                    found,
                    expected,
                    "adapters of different base models cannot be compared",
                ));
            }
            Ok((module, adapter::difference(a, b)?))
        })
        .collect::<Result<_>>()?;
    let beside = beside(&first, &second);
    let total = |f: fn(&Difference) -> f64| adapter::root_of_squares(rows.iter().map(|(_, d)| f(d)));
    let (a, b, off) = (total(|d| d.first), total(|d| d.second), total(|d| d.difference));
    // From the polarisation identity, so that no product of the whole is needed.
    let cosine = |a: f64, b: f64, inner: f64| (a > 0.0 && b > 0.0).then(|| inner / (a * b));
    let inner: f64 = rows
        .iter()
        .filter_map(|(_, d)| Some(d.cosine? * d.first * d.second))
        .sum();
    let whole = Difference {
        first: a,
        second: b,
        difference: off,
        cosine: cosine(a, b, inner),
    };
    if args.json {
        let value = |d: &Difference| json!({ "first": d.first, "second": d.second, "difference": d.difference, "cosine": d.cosine });
        let modules: Vec<Value> = rows
            .iter()
            .map(|(module, d)| {
                let mut value = value(d);
                value["module"] = json!(module);
                value
            })
            .collect();
        let beside: Map<String, Value> = beside.into_iter().map(|(name, d)| (name, json!(d))).collect();
        println!(
            "{:#}",
            json!({ "all": value(&whole), "modules": modules, "beside": beside })
        );
        return Ok(());
    }
    let width = rows
        .iter()
        .map(|(module, _)| short(module).len())
        .max()
        .unwrap_or(0)
        .max(12);
    println!("A: {}: {}", first.dir.display(), words(&first));
    println!("B: {}: {}", second.dir.display(), words(&second));
    println!(
        "{:<width$}        |A|       |B|     |A-B|    cosine",
        "layer module"
    );
    let line = |name: &str, d: &Difference| {
        let cosine = d.cosine.map_or("        -".into(), |c| format!("{c:>9.5}"));
        println!(
            "{name:<width$}  {} {} {} {cosine}",
            figure(d.first),
            figure(d.second),
            figure(d.difference)
        );
    };
    rows.iter().for_each(|(module, d)| line(&short(module), d));
    line("all", &whole);
    for (name, distance) in &beside {
        match distance {
            Some(distance) => println!("{name}: {} apart", figure(*distance).trim()),
            None => println!("{name}: in one of them only, or of another shape"),
        }
    }
    Ok(())
}

/// How far magnitudes of DoRA and modules that trained whole are apart; nothing where only one adapter has them.
fn beside(first: &Adapter, second: &Adapter) -> BTreeMap<String, Option<f64>> {
    let tensors = |adapter: &Adapter| -> BTreeMap<String, Tensor> {
        let magnitudes = adapter.updates.iter().filter_map(|(module, update)| {
            Some((
                format!("{}, magnitudes", short(module)),
                update.magnitude.clone()?,
            ))
        });
        let saved = adapter
            .saved
            .iter()
            .map(|(name, tensor)| (name.escape_debug().to_string(), tensor.clone()));
        magnitudes.chain(saved).collect()
    };
    let (first, second) = (tensors(first), tensors(second));
    let names = first.keys().chain(second.keys());
    names
        .map(|name| {
            let both = first.get(name).zip(second.get(name));
            let distance = both
                .filter(|(a, b)| a.shape() == b.shape())
                .map(|(a, b)| adapter::distance(a, b));
            (name.clone(), distance)
        })
        .collect()
}
