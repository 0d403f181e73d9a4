//! `glmtune doctor`: what this machine, a model, an adapter and a data file are good for, one line for each finding.
//!
//! Every finding stands for itself: one never hides the next. What would stop a run comes first, with the one thing to do.

mod adapter;
mod data;
mod downloads;
mod machine;
mod model;

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use crate::error::{Error, Result};

/// Say what this machine, a model, an adapter and data are good for, and what is in the way
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  glmtune doctor
  glmtune doctor --model chatglm-6b --adapter out/alpaca --data train.json
The exit code is 1 if something would stop a run.")]
pub struct DoctorArgs {
    /// Look at this model folder
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Look at this adapter and, with --model, whether it belongs to that base
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Look at these records (.json or .jsonl)
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Where the 4-bit copy of the base is kept, if not in its own folder
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How much a finding matters; in the order of the lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    /// A run would stop.
    Stops,
    /// A run would go on, and may not be what was meant.
    Warns,
    Fine,
}

impl Level {
    const fn name(self) -> &'static str {
        match self {
            Self::Stops => "stops",
            Self::Warns => "warns",
            Self::Fine => "fine",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug)]
struct Finding {
    /// For programs: it stays what it is when the words change.
    key: &'static str,
    level: Level,
    what: String,
    found: String,
    /// The one thing to do, when something is in the way.
    remedy: Option<String>,
}

impl Finding {
    fn fine(key: &'static str, what: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            key,
            level: Level::Fine,
            what: what.into(),
            found: found.into(),
            remedy: None,
        }
    }

    fn stops(key: &'static str, what: &str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            level: Level::Stops,
            remedy: Some(remedy.into()),
            ..Self::fine(key, what, found)
        }
    }

    fn warns(key: &'static str, what: &str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            level: Level::Warns,
            ..Self::stops(key, what, found, remedy)
        }
    }

    /// What a run would say.
    fn of(key: &'static str, level: Level, what: impl Into<String>, error: &Error) -> Self {
        let (found, remedy) = match error {
            Error::Input {
                place,
                found,
                expected,
                remedy,
            } => (format!("{place}: {found}; expected: {expected}"), remedy.clone()),
            Error::Io {
                path, action, source, ..
            } => (
                format!("{}: cannot {action}: {source}", path.display()),
                "check path and permissions".to_string(),
            ),
            other => (other.to_string(), "run it again with GLMTUNE_SYNC=1".to_string()),
        };
        Self {
            key,
            level,
            what: what.into(),
            found,
            remedy: Some(remedy),
        }
    }

    fn line(&self) -> String {
        let remedy = self.remedy.as_ref().map(|remedy| format!("; {remedy}"));
        let what = match self.level {
            Level::Stops => format!("✗ {:<7}", self.what),
            Level::Warns => format!("! {:<7}", self.what),
            Level::Fine => format!("{:<9}", self.what),
        };
        let line = format!("{what} {}{}", self.found, remedy.unwrap_or_default());
        line.replace('\n', " ")
    }

    fn json(&self) -> Value {
        json!({
            "key": self.key,
            "level": self.level.name(),
            "what": self.what,
            "found": self.found,
            "remedy": self.remedy,
        })
    }
}

/// Runs `glmtune doctor`.
///
/// # Errors
/// Something would stop a run; all that was found has been printed.
pub fn run(args: &DoctorArgs) -> Result<()> {
    let mut findings = args.findings();
    // Stable: what is looked at first stays first.
    findings.sort_by_key(|finding| finding.level);
    let stops = findings.iter().filter(|f| f.level == Level::Stops).count();
    if args.json {
        let findings: Vec<Value> = findings.iter().map(Finding::json).collect();
        println!("{:#}", json!({ "findings": findings, "stops": stops }));
    } else {
        for finding in &findings {
            println!("{}", finding.line());
        }
    }
    match stops {
        0 => Ok(()),
        _ => Err(Error::input(
            "glmtune doctor",
            match stops {
                1 => "1 thing that stops a run".to_string(),
                n => format!("{n} things that stop a run"),
            },
            "none",
            "do what the lines with ✗ say, from the first on",
        )),
    }
}

impl DoctorArgs {
    fn findings(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        machine::look(&mut findings);
        let model = self
            .model
            .as_deref()
            .map(|dir| model::look(dir, self.cache_dir.as_deref(), &mut findings));
        if let Some(dir) = &self.adapter {
            let base = model.as_ref().and_then(|model| model.checkpoint.as_ref());
            adapter::look(dir, base, &mut findings);
        }
        if let Some(path) = &self.data {
            let model = model.as_ref();
            let tokenizer = model.and_then(|model| model.tokenizer.as_ref());
            data::look(path, tokenizer, &mut findings);
        }
        findings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_one_line_with_the_one_thing_to_do() {
        let error = Error::input("--device cuda:0", "no driver", "one", "install it");
        let line = Finding::of("cuda", Level::Warns, "CUDA", &error).line();
        assert_eq!(
            line,
            "! CUDA    --device cuda:0: no driver; expected: one; install it"
        );
        let line = Finding::stops("model.shards", "model", "no\nshards", "download them").line();
        assert_eq!(line, "✗ model   no shards; download them");
        assert_eq!(
            Finding::fine("cpu", "CPU", "2 threads").line(),
            "CPU       2 threads"
        );
        assert!(Level::Stops < Level::Warns && Level::Warns < Level::Fine);
    }
}
