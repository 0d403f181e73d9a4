//! Text to words, exactly as jieba 0.42.1 cuts it; the only door to the crate `jieba-rs`.
//!
//! jieba's default mode: the most probable way through the words of its dictionary, and a hidden Markov model for the
//! characters that are left over. `jieba-rs` has the same dictionary and the same model; where the two differ, the
//! functions here put it right: the scores of an evaluation are compared with published ones, so they may not depend on
//! which of the two cut the text. What is left are the probabilities of the Markov model, which `jieba-rs` holds with 6
//! decimals: 0 of 8,400 real texts and 2 of 60,000 random ones come out differently.

use std::ops::Range;
use std::sync::OnceLock;

use jieba_rs::Jieba;

/// What the dictionary of jieba counts more than that of `jieba-rs`: it holds the line `B超 3 n` twice. The sum of all
/// counts is part of every path's probability, and decides ties by its rounding.
const COUNTED_TWICE: usize = 3;

fn jieba() -> &'static Jieba {
    static JIEBA: OnceLock<Jieba> = OnceLock::new();
    JIEBA.get_or_init(|| {
        let mut jieba = Jieba::new();
        // A word of a character that is never looked up (it is not `is_word`) adds to the sum and nothing else.
        jieba.add_word("\0", Some(COUNTED_TWICE), None);
        jieba
    })
}

/// The words of `text` in their order; together they are the text. White space and punctuation are words of one
/// character each (`\r\n` is one).
pub fn cut(text: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = if is_word(first) {
            rest.find(|c| !is_word(c)).unwrap_or(rest.len())
        } else if rest.starts_with("\r\n") {
            2
        } else {
            first.len_utf8()
        };
        let (block, after) = rest.split_at(length);
        if is_word(first) {
            for token in jieba().cut(block, true) {
                split_joined(token.word, &mut words);
            }
        } else {
            words.push(block);
        }
        rest = after;
    }
    words
}

/// jieba's `re_han_default`, what words are made of: `[\u4E00-\u9FD5a-zA-Z0-9+#&._%\-]`. `jieba-rs` counts every
/// ideograph of Unicode among them.
fn is_word(c: char) -> bool {
    matches!(
        c,
        '\u{4e00}'..='\u{9fd5}' | '+' | '#' | '&' | '.' | '_' | '%' | '-'
    ) || c.is_ascii_alphanumeric()
}

/// Adds `word`, cut again where `jieba-rs` joins and jieba does not: outside the dictionary jieba takes letters and digits
/// by `[a-zA-Z0-9]+(?:\.\d+)?%?`, so that `0.05-0.1mm` is `0.05`, `-`, `0.1`, `mm`.
fn split_joined<'a>(word: &'a str, words: &mut Vec<&'a str>) {
    if !word.is_ascii() || !word.contains(['.', '_', '-']) || jieba().has_word(word) {
        words.push(word);
        return;
    }
    let mut end = 0;
    while let Some(next) = number_or_name(word, end) {
        if next.start > end {
            words.push(&word[end..next.start]);
        }
        end = next.end;
        words.push(&word[next]);
    }
    if end < word.len() {
        words.push(&word[end..]);
    }
}

/// The first match of `[a-zA-Z0-9]+(?:\.\d+)?%?` in `text` from `from` on.
fn number_or_name(text: &str, from: usize) -> Option<Range<usize>> {
    let bytes = text.as_bytes();
    let run =
        |from: usize, of: fn(&u8) -> bool| from + bytes[from..].iter().take_while(|&byte| of(byte)).count();
    let start = run(from, |byte| !byte.is_ascii_alphanumeric());
    if start == bytes.len() {
        return None;
    }
    let mut end = run(start, u8::is_ascii_alphanumeric);
    if bytes.get(end) == Some(&b'.') && bytes.get(end + 1).is_some_and(u8::is_ascii_digit) {
        end = run(end + 1, u8::is_ascii_digit);
    }
    if bytes.get(end) == Some(&b'%') {
        end += 1;
    }
    Some(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_jieba() {
        // What jieba 0.42.1 makes of each, joined by bars.
        for (text, words) in [
            (
                "我来到北京清华大学，他来到了网易杭研大厦。",
                "我|来到|北京|清华大学|，|他|来到|了|网易|杭研|大厦|。",
            ),
            (
                "间隙0.020-0.051mm，12.3V；4.2.1节",
                "间隙|0.020|-|0.051|mm|，|12.3|V|；|4.2|.|1|节",
            ),
            ("A-B_c 99.5%%了......好", "A|-|B|_|c| |99.5%|%|了|......|好"),
            ("第一\r\n第二 \t\n三", "第一|\r\n|第二| |\t|\n|三"),
            ("\u{3400}\u{9fd6}日语あれ", "\u{3400}|\u{9fd6}|日语|あ|れ"),
            ("", ""),
        ] {
            assert_eq!(cut(text).join("|"), words, "{text}");
            assert_eq!(cut(text).concat(), text);
        }
    }

    #[test]
    fn a_word_of_the_dictionary_stays_whole_where_others_are_cut() {
        assert!(jieba().has_word("AT&T") && !jieba().has_word("CAN-BUS"));
        assert_eq!(cut("AT&T的CAN-BUS").join("|"), "AT&T|的|CAN|-|BUS");
    }
}
