//! The model that answers, and the adapter that it wears.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::editor::expand;
use super::talk::{Answered, Speaker};
use crate::cli::generation::{Holding, ModelArgs, describe_adapter, load_base, warn_of_another_base};
use crate::data::{collate, template};
use crate::error::Result;
use crate::generate::{GenerationConfig, OnToken, generate};
use crate::model::Model;
use crate::model::tune::{self, Exchange};
use crate::tokenizer::Tokenizer;
use crate::train::TrainedOn;

/// An answer is being generated: Ctrl-C stops it instead of the program.
static ANSWERING: AtomicBool = AtomicBool::new(false);
/// Ctrl-C was pressed during this answer.
static STOP: AtomicBool = AtomicBool::new(false);

/// When the last answer ended.
static ENDED: Mutex<Option<Instant>> = Mutex::new(None);
/// A Ctrl-C that comes no later than this behind an answer was meant for it.
const LATE: Duration = Duration::from_millis(500);

/// Asks the answer under way to end; is there one, or was there a moment ago? An answer that was asked already and has
/// not come to its next token since, as while a long prompt is read, is none that listens.
pub fn stop_answer() -> bool {
    if ANSWERING.load(Ordering::SeqCst) {
        return !STOP.swap(true, Ordering::SeqCst);
    }
    let ended = ENDED.lock().unwrap_or_else(PoisonError::into_inner);
    ended.is_some_and(|at| at.elapsed() < LATE)
}

/// A loaded model.
pub struct Machine {
    args: ModelArgs,
    model: Model,
    tokenizer: Tokenizer,
    /// How the base was loaded, once for all adapters.
    holding: Holding,
    worn: Option<Worn>,
}

/// The adapter in use.
struct Worn {
    words: String,
    /// What of the base it stands in for.
    base: Exchange,
}

impl Machine {
    /// Loads the model of `args`, with the adapter if there is one.
    ///
    /// # Errors
    /// As [`load_base`]; an adapter of another model.
    pub fn load(args: ModelArgs) -> Result<Self> {
        let trained_on = args.adapter.as_deref().map(TrainedOn::read).transpose()?;
        let holding = Holding::of(args.load_in, &trained_on.unwrap_or_default());
        let (model, tokenizer) = load_base(&args)?;
        let mut machine = Self {
            model,
            tokenizer,
            holding,
            worn: None,
            args,
        };
        if let Some(dir) = machine.args.adapter.clone() {
            let worn = machine.put_on(&dir, machine.args.adapter_scale)?;
            eprintln!("{}", worn.words);
            machine.worn = Some(worn);
        }
        Ok(machine)
    }

    /// Puts an adapter on the base alone, which stays alone when that fails.
    fn put_on(&mut self, dir: &Path, factor: Option<f64>) -> Result<Worn> {
        let (loaded, mut base) = Exchange::load(&mut self.model, dir)?;
        if let Some(factor) = factor
            && let Err(error) = tune::scale_adapter(&mut self.model, factor)
        {
            base.exchange(&mut self.model);
            return Err(error);
        }
        let strength = factor.map_or(String::new(), |factor| format!(", strength {factor}"));
        let words = format!(
            "adapter: {} ({}{strength})",
            dir.display(),
            describe_adapter(&loaded)
        );
        Ok(Worn { words, base })
    }

    /// Says where the base is not the one that an adapter was trained on, as far as its folder tells.
    fn compare(&self, dir: &Path) -> Result<()> {
        let Some(trained_on) = TrainedOn::find(dir)? else {
            return Ok(());
        };
        let there = Holding::of(None, &trained_on);
        let here = &self.holding;
        if there.quantisation != here.quantisation {
            eprintln!(
                "(this adapter was trained on the base {}, which is held {} here: its answers may differ; start with --adapter {} to \
                 hold the base as it was trained)",
                there.words(),
                here.words(),
                dir.display()
            );
        }
        if there.merged != here.merged {
            let names = |holding: &Holding| match holding.merged[..] {
                [] => "none".to_string(),
                ref dirs => dirs
                    .iter()
                    .map(|d| d.display().to_string())
                    .collect::<Vec<_>>()
                    .join(", "),
            };
            eprintln!(
                "(this adapter was trained on the base with other adapters merged into it: {}; here: {}. Start with --adapter {})",
                names(&there),
                names(here),
                dir.display()
            );
        }
        match &trained_on.base {
            Some(base) => warn_of_another_base(&self.args, base, &there.merged),
            None => Ok(()),
        }
    }
}

/// The folder and the factor of `DIR [FACTOR]`; a folder whose name ends in a number is a folder.
fn folder_and_factor(what: &str) -> (PathBuf, Option<f64>) {
    let whole = expand(what);
    if !whole.is_dir()
        && let Some((dir, last)) = what.rsplit_once(char::is_whitespace)
        && let Ok(factor) = last.parse()
    {
        return (expand(dir.trim_end()), Some(factor));
    }
    (whole, None)
}

impl Speaker for Machine {
    fn encode(&self, text: &str) -> Vec<u32> {
        self.tokenizer.build_inputs(&self.tokenizer.encode(text), None)
    }

    fn render(&self, ids: &[u32]) -> String {
        template::process_response(&self.tokenizer.decode(ids))
    }

    fn answer(
        &self,
        ids: &[u32],
        number: u64,
        config: &GenerationConfig,
        on_token: &mut OnToken<'_>,
    ) -> Result<Answered> {
        STOP.store(false, Ordering::SeqCst);
        ANSWERING.store(true, Ordering::SeqCst);
        let batch = collate::left_pad(&[ids.to_vec()], &self.tokenizer.special());
        let result = generate(&self.model, &batch, &[number], config, &mut |row, id| {
            if STOP.load(Ordering::SeqCst) {
                ControlFlow::Break(())
            } else {
                on_token(row, id)
            }
        });
        *ENDED.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        ANSWERING.store(false, Ordering::SeqCst);
        Ok(Answered {
            speed: result?.speed,
            stopped: STOP.load(Ordering::SeqCst),
        })
    }

    fn adapter(&mut self, what: &str) -> Result<String> {
        if what.is_empty() {
            let worn = self.worn.as_ref();
            return Ok(worn.map_or("no adapter".to_string(), |worn| worn.words.clone()));
        }
        // What cannot be read is found before anything is exchanged.
        let wanted = (what != "off").then(|| folder_and_factor(what));
        if let Some((dir, _)) = &wanted {
            self.compare(dir)?;
        }
        // Exchanged, the half that was kept beside the model is the adapter: it comes back when the new one does not fit.
        let mut before = self.worn.take();
        if let Some(worn) = &mut before {
            worn.base.exchange(&mut self.model);
        }
        let Some((dir, factor)) = wanted else {
            return Ok("no adapter: the base alone".to_string());
        };
        match self.put_on(&dir, factor) {
            Ok(worn) => {
                let words = worn.words.clone();
                self.worn = Some(worn);
                Ok(words)
            }
            Err(error) => {
                if let Some(mut worn) = before {
                    worn.base.exchange(&mut self.model);
                    self.worn = Some(worn);
                }
                Err(error)
            }
        }
    }

    fn bytes(&self) -> usize {
        self.model.decode_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_asked_to_end_once() {
        assert!(!stop_answer(), "there is none");
        STOP.store(false, Ordering::SeqCst);
        ANSWERING.store(true, Ordering::SeqCst);
        assert!(stop_answer());
        assert!(!stop_answer(), "it has not listened: the program ends");
        ANSWERING.store(false, Ordering::SeqCst);
    }

    #[test]
    fn a_factor_stands_behind_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().display().to_string();
        assert_eq!(folder_and_factor(&name), (dir.path().into(), None));
        assert_eq!(
            folder_and_factor(&format!("{name} 0.5")),
            (dir.path().into(), Some(0.5))
        );
        assert_eq!(folder_and_factor("no where"), ("no where".into(), None));
        let odd = dir.path().join("run 2");
        std::fs::create_dir(&odd).unwrap();
        assert_eq!(folder_and_factor(odd.to_str().unwrap()), (odd.clone(), None));
        assert_eq!(
            folder_and_factor(&format!("{} 2", odd.display())),
            (odd, Some(2.0))
        );
    }
}
