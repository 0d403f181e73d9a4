//! Is a result what it was made from? The measured figures beside what is allowed.

use std::fmt;
use std::path::{Path, PathBuf};

use super::{Bound, Comparison, Kept, Rounding};
use crate::error::{Error, Result};

/// A result that was compared: what was measured, and by what.
#[derive(Debug, Clone)]
pub struct Verified {
    /// What was measured.
    pub comparison: Comparison,
    /// The user's own records, if those were compared on.
    pub data: Option<PathBuf>,
    /// What may make the result differ.
    pub roundings: Vec<Rounding>,
    /// What is let pass.
    pub bound: Bound,
    /// Did the user choose it?
    pub chosen: bool,
    /// Where and in which type both were computed, in words.
    pub compute: String,
}

impl Verified {
    /// Refuses a result that is further from its reference than the bound, or, unless the user chose the bound, that has lost the
    /// adapters.
    ///
    /// # Errors
    /// It is, or it has; `place` is its name for people.
    pub fn check(&self, place: &Path) -> Result<()> {
        let Comparison {
            max_diff,
            mean_diff,
            worst,
            ..
        } = &self.comparison;
        if self.bound.admits(*max_diff, *mean_diff) {
            return self.check_adapters(place);
        }
        let (largest, mean) = (number(*max_diff), number(*mean_diff));
        Err(Error::input(
            place.display(),
            format!("logits up to {largest} ({worst}), on average {mean} from those of the reference"),
            format!("at most {}", self.allowed()),
            remedy(&self.roundings),
        ))
    }

    /// A user who chose the bound also let pass what is within it.
    fn check_adapters(&self, place: &Path) -> Result<()> {
        let Comparison { kept, spread, .. } = &self.comparison;
        match kept {
            Some(kept) if kept.is_lost(*spread) && !self.chosen => Err(Error::input(
                place.display(),
                format!(
                    "{} of what the adapters do to the logits",
                    percent(kept.share.unwrap_or_default())
                ),
                "about all of it (50 % to 150 %)",
                "write it again with these adapters, or in a finer type (f16, q8_0; of a merge: --type fp32 or --into dequantized); \
                 --verify-bound X lets it pass",
            )),
            _ => Ok(()),
        }
    }

    /// "98.7 % (they move logits by 0.53)".
    fn kept(&self, kept: &Kept) -> String {
        let effect = number(kept.effect);
        match kept.share {
            None => "the adapters move no logit".to_string(),
            Some(share) if kept.is_unclear(self.comparison.spread) => format!(
                "{}, which tells nothing: they move logits by {effect}, rounding by {}",
                percent(share),
                number(kept.rest)
            ),
            Some(share) => format!("{} (they move logits by {effect})", percent(share)),
        }
    }

    /// "0.18, on average 0.01 (0.05 and 0.003 of the spread: float16)".
    fn allowed(&self) -> String {
        let Bound { largest, mean } = self.bound;
        if self.chosen {
            return format!("{} (--verify-bound)", number(largest));
        }
        let names: Vec<String> = self.roundings.iter().map(Rounding::to_string).collect();
        let names = match names.is_empty() {
            true => "the same weights".to_string(),
            false => names.join(" and "),
        };
        let share = |x: f64| number(x / self.comparison.spread);
        format!(
            "{}, on average {} ({} and {} of the spread: {names})",
            number(largest),
            number(mean),
            share(largest),
            share(mean)
        )
    }

    /// The table: what was measured and the figure.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let c = &self.comparison;
        let mut rows = vec![
            ("prompts", format!("{} ({} positions)", c.prompts, c.positions)),
            (
                "largest logit difference",
                format!("{} at {}", number(c.max_diff), c.worst),
            ),
            ("allowed", self.allowed()),
            ("mean logit difference", number(c.mean_diff)),
            ("spread of the logits", number(c.spread)),
            ("same most probable token", format!("{:.2} %", 100.0 * c.top1)),
            ("mean KL divergence", format!("{} nats", number(c.kl))),
        ];
        if let Some(kept) = &c.kept {
            rows.push(("adapters' effect kept", self.kept(kept)));
        }
        if let (Some((reference, result)), Some(data)) = (c.loss, &self.data) {
            let change = format!("{reference:.4} -> {result:.4} on {}", data.display());
            rows.push(("loss", change));
        }
        rows
    }
}

impl fmt::Display for Verified {
    /// Names may hold wide characters: they stand at the end of a line, where they push nothing aside.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.rows().into_iter();
        let lines: Vec<String> = rows.map(|(what, found)| format!("{what:<26}{found}")).collect();
        f.write_str(&lines.join("\n"))
    }
}

/// Three significant digits, as short as they can be.
fn number(x: f64) -> String {
    match x.abs() {
        0.0 => "0".to_string(),
        size if (1e-3..1e4).contains(&size) => {
            let digits = (2 - size.log10().floor() as i32).max(0) as usize;
            let text = format!("{x:.digits$}");
            match text.contains('.') {
                true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
                false => text,
            }
        }
        _ => format!("{x:.2e}"),
    }
}

/// "98.7 %".
fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// The one thing to do about a result that is too far from its reference.
fn remedy(roundings: &[Rounding]) -> &'static str {
    use Rounding::{AnotherBase, BF16, ComputedInBF16, ComputedInF16, F16, F32};
    let computed = |rounding: &Rounding| matches!(rounding, ComputedInF16 | ComputedInBF16);
    let exact = |rounding: &Rounding| matches!(rounding, F32 | F16 | BF16) || computed(rounding);
    if roundings.contains(&AnotherBase) {
        "merge into what the adapter was trained on (leave --into out), or allow more with --verify-bound X"
    } else if roundings.iter().all(exact) && roundings.iter().any(computed) {
        "compare in float32, which tells more (leave --dtype out), or allow more with --verify-bound X"
    } else if roundings.iter().all(exact) {
        "nothing was kept: write it again, and check base and adapter with `glmtune inspect` if it fails once more"
    } else {
        "choose a finer type (q8_0 or f16; of a merge: --into dequantized), or allow more with --verify-bound X"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verified(max_diff: f64, roundings: &[Rounding], chosen: Option<f64>) -> Verified {
        let comparison = Comparison {
            prompts: 2,
            positions: 30,
            max_diff,
            worst: "built-in prompt 1, token 7".into(),
            mean_diff: 0.000_012_34,
            spread: 2.5,
            top1: 0.9875,
            kl: 0.0,
            kept: None,
            loss: Some((1.25, 1.251)),
        };
        Verified {
            bound: chosen.map_or_else(|| Bound::of(2.5, roundings), Bound::chosen),
            chosen: chosen.is_some(),
            compute: "the CPU in float32".into(),
            comparison,
            data: Some("数据.json".into()),
            roundings: roundings.to_vec(),
        }
    }

    #[test]
    fn the_table_says_what_was_measured_and_what_is_allowed() {
        let table = verified(0.012_345, &[Rounding::F16], None).to_string();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0], "prompts                   2 (30 positions)");
        assert_eq!(
            lines[1],
            "largest logit difference  0.0123 at built-in prompt 1, token 7"
        );
        assert!(
            lines[2].starts_with("allowed                   0.126, on average 0.00763"),
            "{table}"
        );
        assert!(lines[2].ends_with("of the spread: float16)"), "{table}");
        assert_eq!(lines[3], "mean logit difference     1.23e-5");
        assert_eq!(lines[5], "same most probable token  98.75 %");
        assert_eq!(lines[6], "mean KL divergence        0 nats");
        assert_eq!(
            lines[7],
            "loss                      1.2500 -> 1.2510 on 数据.json"
        );
        assert_eq!(
            [0.5, 12.0, 120.0, 1234.0, 99_999.0].map(number),
            ["0.5", "12", "120", "1234", "1.00e5"]
        );
    }

    #[test]
    fn a_result_without_the_adapters_is_refused_although_it_is_within_the_bound() {
        let place = Path::new("out/merged");
        let with = |share: Option<f64>, rest: f64, chosen| {
            let mut verified = verified(1.5, &[Rounding::Bits4], chosen);
            verified.comparison.kept = Some(Kept {
                share,
                effect: 0.25,
                rest,
            });
            verified
        };
        let kept = with(Some(0.9871), 0.4, None);
        assert!(kept.check(place).is_ok());
        let row = "adapters' effect kept     98.7 % (they move logits by 0.25)";
        assert!(kept.to_string().contains(row), "{kept}");
        let line = with(Some(0.031), 0.4, None).check(place).unwrap_err().to_string();
        assert!(
            line.starts_with("out/merged: found 3.1 % of what the adapters do")
                && line.contains("write it again"),
            "{line}"
        );
        assert!(with(Some(0.031), 0.4, Some(9.0)).check(place).is_ok());
        let unclear = with(Some(0.031), 0.9, None);
        assert!(unclear.check(place).is_ok() && unclear.to_string().contains("tells nothing"));
        let none = with(None, 0.4, None);
        assert!(none.check(place).is_ok() && none.to_string().contains("move no logit"));
    }

    #[test]
    fn beyond_the_bound_there_is_one_line_with_the_figures_and_the_remedy() {
        let place = Path::new("out/merged");
        assert!(verified(0.01, &[Rounding::F16], None).check(place).is_ok());
        let refused = |verified: Verified| verified.check(place).unwrap_err().to_string();
        let line = refused(verified(1.5, &[Rounding::F16], None));
        assert!(
            line.starts_with(
                "out/merged: found logits up to 1.5 (built-in prompt 1, token 7), on average 1.23e-5 from"
            ),
            "{line}"
        );
        assert!(line.contains("write it again"), "{line}");
        let line = refused(verified(
            1.5,
            &[Rounding::Bits8, Rounding::AnotherBase],
            Some(0.25),
        ));
        assert!(line.contains("at most 0.25 (--verify-bound)"), "{line}");
        assert!(line.contains("leave --into out"), "{line}");
        assert!(refused(verified(99.0, &[Rounding::Bits4], None)).contains("q8_0"));
        let computed = [Rounding::F16, Rounding::ComputedInBF16];
        assert!(verified(1.5, &computed, None).check(place).is_ok());
        let line = refused(verified(9.0, &computed, None));
        assert!(
            line.contains("computing in bfloat16") && line.contains("leave --dtype out"),
            "{line}"
        );
        let mut shifted = verified(0.1, &[Rounding::F16], None);
        shifted.comparison.mean_diff = 0.05;
        assert!(shifted.check(place).is_err(), "everything is a little wrong");
        // A number that is none is above every bound: compare refuses it before, and so would this.
        assert!(verified(f64::NAN, &[], Some(1.0)).check(place).is_err());
    }
}
