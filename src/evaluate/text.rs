//! BLEU-4 and ROUGE as the official `ptuning/main.py` computes them.
//!
//! The official script asks nltk for `sentence_bleu` over the characters with smoothing method 3, and `rouge_chinese` for
//! ROUGE over the words that jieba cuts, joined by blanks; each score is multiplied by 100 and rounded to 4 decimals, and
//! the scores of all rows are averaged. The formulas below are read from nltk 3.10, rouge_chinese 1.0.3 and jieba 0.42.1,
//! oddities included, and compared with them in `tests/golden/metrics.rs`. One thing is different: an empty answer or
//! reference scores 0, where the official script stops with an error.

use std::collections::{HashMap, HashSet};

pub use super::words::cut;

use crate::tokenizer::is_python_space;

/// The scores of one answer, each from 0 to 100.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct TextScores {
    /// BLEU-4 of characters: [`bleu4`].
    pub bleu4: f64,
    /// F of ROUGE-1 of words: [`rouge_n`].
    pub rouge1: f64,
    /// F of ROUGE-2 of words.
    pub rouge2: f64,
    /// F of ROUGE-L of words: [`rouge_l`].
    pub rouge_l: f64,
}

impl TextScores {
    /// The official names and the scores, in the official order.
    pub fn named(&self) -> [(&'static str, f64); 4] {
        [
            ("rouge-1", self.rouge1),
            ("rouge-2", self.rouge2),
            ("rouge-l", self.rouge_l),
            ("bleu-4", self.bleu4),
        ]
    }

    /// The mean of each score; `None` of nothing.
    pub fn mean(all: impl IntoIterator<Item = TextScores>) -> Option<Self> {
        let mut sum = Self::default();
        let mut count = 0usize;
        for scores in all {
            sum.bleu4 += scores.bleu4;
            sum.rouge1 += scores.rouge1;
            sum.rouge2 += scores.rouge2;
            sum.rouge_l += scores.rouge_l;
            count += 1;
        }
        let n = count as f64;
        (count > 0).then(|| Self {
            bleu4: sum.bleu4 / n,
            rouge1: sum.rouge1 / n,
            rouge2: sum.rouge2 / n,
            rouge_l: sum.rouge_l / n,
        })
    }
}

/// Nothing but white space, as Python sees it.
pub fn is_empty(text: &str) -> bool {
    text.chars().all(is_python_space)
}

/// BLEU-4 and ROUGE of `prediction` against `reference`, times 100, rounded to 4 decimals; all 0 when either
/// [`is_empty`].
pub fn score(prediction: &str, reference: &str) -> TextScores {
    if is_empty(prediction) || is_empty(reference) {
        return TextScores::default();
    }
    let (hypothesis, truth) = (Words::of(prediction), Words::of(reference));
    let (hypothesis, truth) = (hypothesis.list(), truth.list());
    TextScores {
        bleu4: percent(bleu4(prediction, reference)),
        rouge1: percent(rouge_n(&hypothesis, &truth, 1)),
        rouge2: percent(rouge_n(&hypothesis, &truth, 2)),
        rouge_l: percent(rouge_l(&hypothesis, &truth)),
    }
}

/// Python's `round(100 * x, 4)`: to the nearest decimal of the exact value, ties to even.
fn percent(x: f64) -> f64 {
    format!("{:.4}", x * 100.0).parse().unwrap_or(f64::NAN)
}

/// nltk's `sentence_bleu` of characters with uniform weights and `SmoothingFunction().method3`, from 0 to 1:
///
/// `BP * exp(1/4 Σ_n ln p_n)`, n from 1 to 4. `p_n` is the share of the prediction's n-grams that occur in the reference,
/// each counted at most as often as there; the count of an order is at least 1, so that a prediction shorter than n has
/// `0 / 1`. The k-th order without a match gets `p_n = 1 / (2^k count)` (NIST's geometric sequence; Chen and Cherry 2014).
/// `BP = 1` if the prediction is longer than the reference, else `exp(1 - r / c)` of their lengths r and c. Without a
/// common character the score is 0.
pub fn bleu4(prediction: &str, reference: &str) -> f64 {
    let hypothesis: Vec<char> = prediction.chars().collect();
    let truth: Vec<char> = reference.chars().collect();
    let mut smoothed = 0;
    let mut sum = 0.0;
    for n in 1..=4 {
        let (matches, count) = clipped_matches(&hypothesis, &truth, n);
        let count = count.max(1) as f64;
        let p = match (matches, n) {
            (0, 1) => return 0.0,
            (0, _) => {
                smoothed += 1;
                1.0 / (f64::from(1 << smoothed) * count)
            }
            _ => matches as f64 / count,
        };
        sum += 0.25 * p.ln();
    }
    let (c, r) = (hypothesis.len() as f64, truth.len() as f64);
    let brevity = if c > r { 1.0 } else { (1.0 - r / c).exp() };
    brevity * sum.exp()
}

/// How many n-grams of `hypothesis` are in `truth`, none more often than there; and how many it has.
fn clipped_matches(hypothesis: &[char], truth: &[char], n: usize) -> (usize, usize) {
    let mut left: HashMap<&[char], usize> = HashMap::new();
    for gram in truth.windows(n) {
        *left.entry(gram).or_default() += 1;
    }
    let grams = hypothesis.windows(n);
    let count = grams.len();
    let matches = grams
        .filter(|gram| match left.get_mut(gram) {
            Some(times) if *times > 0 => {
                *times -= 1;
                true
            }
            _ => false,
        })
        .count();
    (matches, count)
}

/// The F value of `rouge_chinese` from precision p and recall r: `2 p r / (p + r + 1e-8)`.
fn f_value(overlap: usize, hypothesis: usize, truth: usize) -> f64 {
    let ratio = |of: usize| if of == 0 { 0.0 } else { overlap as f64 / of as f64 };
    let (p, r) = (ratio(hypothesis), ratio(truth));
    2.0 * ((p * r) / (p + r + 1e-8))
}

/// ROUGE-N of words, from 0 to 1. `rouge_chinese` counts each n-gram once (it holds them in sets), and lets n-grams reach
/// over the ends of sentences.
pub fn rouge_n(hypothesis: &[&str], truth: &[&str], n: usize) -> f64 {
    let grams: HashSet<&[&str]> = hypothesis.windows(n).collect();
    let of_truth: HashSet<&[&str]> = truth.windows(n).collect();
    f_value(grams.intersection(&of_truth).count(), grams.len(), of_truth.len())
}

/// ROUGE-L of words, from 0 to 1: the overlap is the longest common subsequence of all words. (`rouge_chinese` calls it
/// summary level, but joins the sentences first.)
pub fn rouge_l(hypothesis: &[&str], truth: &[&str]) -> f64 {
    let mut row = vec![0; truth.len() + 1];
    for word in hypothesis {
        let mut diagonal = 0;
        for (j, other) in truth.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if word == other {
                diagonal + 1
            } else {
                above.max(row[j])
            };
            diagonal = above;
        }
    }
    f_value(row[truth.len()], hypothesis.len(), truth.len())
}

/// A text cut by jieba, its words joined by blanks, and cut again as `rouge_chinese` does.
pub struct Words(String);

impl Words {
    /// The words of `text`.
    pub fn of(text: &str) -> Self {
        let joined: Vec<char> = cut(text).join(" ").chars().collect();
        let joined = end_sentences(&joined, |rest| {
            usize::from(matches!(rest[0], '。' | '！' | '？' | '?'))
        });
        // A word of seven dots comes apart here.
        let joined = end_sentences(&joined, |rest| if rest.starts_with(&['.'; 6]) { 6 } else { 0 });
        let text: String = joined.into_iter().collect();
        Self(text.trim_end_matches(is_python_space).to_string())
    }

    /// The list that n-grams are made of. A sentence of nothing but white space is one empty word.
    pub fn list(&self) -> Vec<&str> {
        let sentences = self.0.split('\n').filter(|sentence| !sentence.is_empty());
        sentences
            .flat_map(|sentence| {
                let mut words: Vec<&str> = sentence
                    .split(is_python_space)
                    .filter(|word| !word.is_empty())
                    .collect();
                if words.is_empty() {
                    words.push("");
                }
                words
            })
            .collect()
    }
}

/// Python's `re.sub("(END)([^”’])", r"\1\n\2", text)`, where `end` tells the length of END at the start of what it is
/// given, 0 for none: a new line after each END, if something other than a closing quotation mark follows.
///
/// Of the four substitutions of `rouge_chinese` two cannot happen to words joined by blanks: those of `……` and of an end
/// with its quotation mark, characters that jieba always keeps apart.
fn end_sentences(text: &[char], end: impl Fn(&[char]) -> usize) -> Vec<char> {
    let mut out = Vec::with_capacity(text.len() + 8);
    let mut i = 0;
    while i < text.len() {
        let length = end(&text[i..]);
        match text.get(i + length) {
            Some(next) if length > 0 && !matches!(next, '”' | '’') => {
                out.extend_from_slice(&text[i..i + length]);
                out.extend(['\n', *next]);
                i += length + 1;
            }
            _ => {
                out.push(text[i]);
                i += 1;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Vec<String> {
        Words::of(text).list().into_iter().map(String::from).collect()
    }

    #[test]
    fn a_text_against_itself_has_every_score() {
        let scores = score("今天天气很好，我们去公园。", "今天天气很好，我们去公园。");
        assert_eq!(scores.named().map(|(_, value)| value), [100.0; 4]);
    }

    #[test]
    fn nothing_scores_nothing() {
        for (prediction, reference) in [("", "好"), (" \n\u{3000}\u{1c}", "好"), ("好", ""), ("", "")] {
            assert_eq!(score(prediction, reference), TextScores::default());
        }
        assert_eq!(TextScores::mean([]), None);
        let half = TextScores::mean([score("好的好的", "好的好的"), score("", "好的好的")]).unwrap();
        assert_eq!((half.bleu4, half.rouge1), (50.0, 50.0));
    }

    #[test]
    fn bleu_is_its_formula() {
        // 3 of 4 characters, 2 of 3 pairs, 1 of 2 triples; no four: 1 / (2 * 1). As long as the reference: exp(1 - 1).
        let want = (0.25 * (0.75f64.ln() + (2.0 / 3.0f64).ln() + 0.5f64.ln() + 0.5f64.ln())).exp();
        assert!((bleu4("abcx", "abcd") - want).abs() < 1e-15);
        // Two characters: orders 3 and 4 have no n-gram at all, and are the first and the second without a match.
        let want = (1.0 - 4.0 / 2.0f64).exp() * (0.25 * (0.5f64.ln() + 0.25f64.ln())).exp();
        assert!((bleu4("ab", "abcd") - want).abs() < 1e-15);
        // Clipped: one of two.
        let want = (0.25 * (0.5f64.ln() + 0.5f64.ln() + 0.25f64.ln() + 0.125f64.ln())).exp();
        assert!((bleu4("aa", "a") - want).abs() < 1e-15);
        assert_eq!(bleu4("xyz", "abc"), 0.0);
    }

    #[test]
    fn rouge_counts_an_n_gram_once_and_has_no_sentences() {
        let f = |p: f64, r: f64| 2.0 * ((p * r) / (p + r + 1e-8));
        assert_eq!(rouge_n(&["a", "a", "b"], &["a", "c"], 1), f(0.5, 0.5));
        assert_eq!(rouge_n(&["a"], &["a"], 2), 0.0);
        assert_eq!(
            rouge_l(&["a", "x", "b", "c"], &["a", "b", "y", "c"]),
            f(0.75, 0.75)
        );
    }

    #[test]
    fn the_words_are_those_that_rouge_chinese_sees() {
        assert_eq!(list("好。坏！ok?"), ["好", "。", "坏", "！", "ok", "?"]);
        assert_eq!(list("a.......b"), ["a", "......", ".", "b"]);
        assert_eq!(list("a\n\nb"), ["a", "", "b"]);
        assert_eq!(list("好。\n\n"), ["好", "。"]);
        assert_eq!(list("\n好"), ["好"]);
    }
}
