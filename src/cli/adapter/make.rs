//! `glmtune adapter scale`, `add` and `resize`.

use std::path::Path;

use serde_json::{Value, json};

use super::chart::figure;
use super::{AddArgs, Method, OutputArgs, ResizeArgs, ScaleArgs, open, short};
use crate::adapter::{self, Adapter, Rank, Resized};
use crate::checkpoint::PartialFolder;
use crate::error::{Error, Result};
use crate::train::{NOTE, TrainedOn};

pub(super) fn scale(args: &ScaleArgs) -> Result<()> {
    let adapter = open(&args.adapter)?;
    let scaled = adapter::scale(&adapter, args.factor)?;
    write(&scaled, &args.output, &[&adapter])?;
    if adapter.config.use_dora || !adapter.saved.is_empty() {
        println!("as in PEFT, magnitudes of DoRA and modules that trained whole stay what they are");
    }
    println!(
        "{}: {} times {}, alpha {}",
        args.output.output.display(),
        args.factor,
        adapter.dir.display(),
        scaled.config.lora_alpha
    );
    Ok(())
}

pub(super) fn add(args: &AddArgs) -> Result<()> {
    if !args.weights.is_empty() && args.weights.len() != args.adapters.len() {
        return Err(Error::Usage(format!(
            "--weights: found {} of them for {} adapters, expected one for each",
            args.weights.len(),
            args.adapters.len()
        )));
    }
    if args.method == Method::Cat && args.rank.is_some() {
        return Err(Error::Usage(
            "--rank belongs to --method svd: with cat ranks add up".into(),
        ));
    }
    let adapters: Vec<Adapter> = args.adapters.iter().map(|dir| open(dir)).collect::<Result<_>>()?;
    let weights = args.weights.iter().copied().chain(std::iter::repeat(1.0));
    let weighted: Vec<(&Adapter, f64)> = adapters.iter().zip(weights).collect();
    let mut sum = adapter::add(&weighted)?;
    let mut costs = None;
    if args.method == Method::Svd {
        let highest = adapters
            .iter()
            .flat_map(|a| a.updates.values())
            .map(|u| u.rank())
            .max();
        let (lower, resized) = adapter::resize(&sum, Rank::Fixed(args.rank.or(highest).unwrap_or(1)))?;
        (sum, costs) = (lower, Some(resized));
    }
    write(&sum, &args.output, &adapters.iter().collect::<Vec<_>>())?;
    if let Some(resized) = &costs {
        table(resized);
    }
    println!(
        "{}: the sum of {} adapters, r {}{}",
        args.output.output.display(),
        adapters.len(),
        sum.config.r,
        if costs.is_none() { ", exact" } else { "" }
    );
    Ok(())
}

pub(super) fn resize(args: &ResizeArgs) -> Result<()> {
    let adapter = open(&args.adapter)?;
    let rank = match (args.rank, args.error) {
        (Some(r), _) => Rank::Fixed(r),
        (None, error) => Rank::Error(error.unwrap_or(0.0)),
    };
    let (lower, resized) = adapter::resize(&adapter, rank)?;
    write(&lower, &args.output, &[&adapter])?;
    if args.json {
        let modules: Vec<Value> = resized
            .iter()
            .map(|r| {
                json!({ "module": r.module, "before": r.before, "after": r.after, "norm": r.norm, "error": r.error,
                    "relative": relative(r) })
            })
            .collect();
        println!(
            "{:#}",
            json!({ "modules": modules, "relative": adapter::total_error(&resized) })
        );
        return Ok(());
    }
    table(&resized);
    let (least, most) = (
        resized.iter().map(|r| r.after).min().unwrap_or(0),
        resized.iter().map(|r| r.after).max().unwrap_or(0),
    );
    let ranks = if least == most {
        format!("r {most}")
    } else {
        format!("r {least} to {most}")
    };
    println!(
        "{}: {ranks}, |sBA - s'B'A'| / |sBA| = {:.3e}",
        args.output.output.display(),
        adapter::total_error(&resized)
    );
    if adapter.config.use_dora {
        println!("DoRA: the error is that of the directions; magnitudes stay what they are");
    }
    Ok(())
}

fn relative(resized: &Resized) -> f64 {
    match resized.norm > 0.0 {
        true => resized.error / resized.norm,
        false => 0.0,
    }
}

/// What a lower rank costs, linear by linear.
fn table(resized: &[Resized]) {
    let mut rows: Vec<&Resized> = resized.iter().collect();
    rows.sort_by_key(|r| adapter::place_of(&r.module));
    let width = rows
        .iter()
        .map(|r| short(&r.module).len())
        .max()
        .unwrap_or(0)
        .max(12);
    println!(
        "{:<width$}  rank          |sBA|     error  relative",
        "layer module"
    );
    for r in &rows {
        println!(
            "{:<width$}  {:>4} -> {:<4} {} {} {}",
            short(&r.module),
            r.before,
            r.after,
            figure(r.norm),
            figure(r.error),
            figure(relative(r))
        );
    }
}

/// Writes `adapter` into a new folder, reads it back, and gives it its name.
fn write(adapter: &Adapter, args: &OutputArgs, inputs: &[&Adapter]) -> Result<()> {
    let output = &args.output;
    refuse(args, inputs)?;
    let folder = PartialFolder::create(output)?;
    adapter.write(folder.dir())?;
    adapter.check_written(folder.dir())?;
    if let Some(run) = trained_on(inputs)? {
        run.write_note(folder.dir())?;
    }
    folder.commit(output)
}

/// What the adapters were trained on, where one of them tells: merging asks for it.
///
/// # Errors
/// Two were not trained on the same.
fn trained_on(inputs: &[&Adapter]) -> Result<Option<TrainedOn>> {
    let mut first: Option<(&Path, TrainedOn)> = None;
    for input in inputs {
        let Some(run) = TrainedOn::find(&input.dir)? else {
            continue;
        };
        match &first {
            None => first = Some((&input.dir, run)),
            Some((dir, other)) if !run.is_of_same_base(other) => {
                return Err(Error::input(
                    input.dir.display(),
                    format!("another base, or another form of it, than {}", dir.display()),
                    "adapters that were trained on the same",
                    "merge them one after the other with `glmtune merge` instead",
                ));
            }
            Some(_) => {}
        }
    }
    Ok(first.map(|(_, run)| run))
}

/// Nothing is replaced but an adapter, on demand, and never an input.
fn refuse(args: &OutputArgs, inputs: &[&Adapter]) -> Result<()> {
    let output = &args.output;
    let wrong = |found: String, expected: &str, remedy: &str| {
        Err(Error::input(output.display(), found, expected, remedy))
    };
    let Ok(place) = output.canonicalize() else {
        return Ok(());
    };
    let touched = |dir: &Path| dir.canonicalize().is_ok_and(|dir| dir.starts_with(&place));
    if let Some(input) = inputs.iter().find(|input| touched(&input.dir)) {
        let found = format!("the input {}", input.dir.display());
        return wrong(
            found,
            "another folder than the inputs'",
            "give --output another name",
        );
    }
    if !args.overwrite {
        let remedy = "give --overwrite to replace an adapter, or --output another name";
        return wrong(
            "something there already".into(),
            "the name of a new folder",
            remedy,
        );
    }
    let names = |name: std::ffi::OsString| name.to_string_lossy().into_owned();
    let foreign = std::fs::read_dir(output)
        .map_err(Error::io(output, "list"))?
        .flatten()
        .map(|e| names(e.file_name()));
    let mut foreign = foreign.filter(|name| {
        ![
            "adapter_config.json",
            "adapter_model.safetensors",
            "adapter_model.bin",
            "README.md",
            "glmtune.json",
            NOTE,
        ]
        .contains(&name.as_str())
    });
    match foreign.next() {
        None => Ok(()),
        Some(name) => {
            let found = format!("{} in it", name.escape_debug());
            wrong(
                found,
                "nothing but an adapter to be replaced",
                "give --output another name",
            )
        }
    }
}
