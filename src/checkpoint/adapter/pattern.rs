//! `rank_pattern` and `alpha_pattern`: values of single linears.

use regex_lite::Regex;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Values for modules whose names match a pattern, the first match first; the door to regular expressions.
///
/// As PEFT matches: the pattern is a regular expression for the end of the module's name, from its start or from after a dot
/// (`re.match(rf"(.*\.)?({pattern})$", name)`).
#[derive(Debug, Clone)]
pub struct Patterns<T>(Vec<(String, Matcher, T)>);

/// How a pattern is matched.
#[derive(Debug, Clone)]
enum Matcher {
    /// Letters, digits, underscores and dots, which match any character: the usual case, and a fast one.
    Plain,
    Expression(Regex),
}

impl Matcher {
    fn new(pattern: &str) -> Result<Self, regex_lite::Error> {
        if pattern
            .bytes()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'.'))
        {
            return Ok(Self::Plain);
        }
        // On its own first: `a)|(b` must not become one by what is put around it.
        Regex::new(pattern)?;
        whole(&format!(r"(?:.*\.)?(?:{pattern})")).map(Self::Expression)
    }

    fn is_match(&self, pattern: &str, module: &str) -> bool {
        let Self::Expression(regex) = self else {
            let (pattern, module) = (pattern.as_bytes(), module.as_bytes());
            let Some(before) = module.len().checked_sub(pattern.len()) else {
                return false;
            };
            let mut pairs = pattern.iter().zip(&module[before..]);
            return (before == 0 || module[before - 1] == b'.') && pairs.all(|(p, c)| p == c || *p == b'.');
        };
        regex.is_match(module)
    }
}

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self::none()
    }
}

impl<T: PartialEq> PartialEq for Patterns<T> {
    fn eq(&self, other: &Self) -> bool {
        let pairs = |(key, _, value): &(String, Matcher, T), (key2, _, value2): &(String, Matcher, T)| {
            key == key2 && value == value2
        };
        self.0.len() == other.0.len() && self.0.iter().zip(&other.0).all(|(a, b)| pairs(a, b))
    }
}

impl<T> Patterns<T> {
    /// No pattern.
    pub const fn none() -> Self {
        Self(Vec::new())
    }
}

impl<T: Copy> Patterns<T> {
    /// The patterns in the order in which they are tried.
    ///
    /// # Errors
    /// A pattern is no regular expression, or one with look-around, which Python has and this program has not.
    pub fn new(pairs: impl IntoIterator<Item = (String, T)>) -> Result<Self> {
        let compiled = pairs.into_iter().map(|(pattern, value)| {
            let matcher = Matcher::new(&pattern).map_err(|e| {
                Error::input(
                    format!("the pattern {pattern}"),
                    e,
                    "the end of a module's name, or a regular expression for it without look-around",
                    "write the names out",
                )
            })?;
            Ok((pattern, matcher, value))
        });
        compiled.collect::<Result<_>>().map(Self)
    }

    /// The value for `module`, a name without PEFT's `base_model.model.`.
    pub fn get(&self, module: &str) -> Option<T> {
        let found = self
            .0
            .iter()
            .find(|(pattern, matcher, _)| matcher.is_match(pattern, module));
        found.map(|&(_, _, value)| value)
    }

    /// Is there no pattern?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The patterns and their values, in order.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, T)> {
        self.0
            .iter()
            .map(|(pattern, _, value)| (pattern.as_str(), *value))
    }

    /// The same patterns with other values.
    pub fn map<U>(&self, f: impl Fn(T) -> U) -> Patterns<U> {
        let pairs = self.0.iter();
        Patterns(
            pairs
                .map(|(key, matcher, value)| (key.clone(), matcher.clone(), f(*value)))
                .collect(),
        )
    }

    /// As an object of `adapter_config.json`.
    pub fn to_json(&self, value: impl Fn(T) -> Value) -> Value {
        Value::Object(Map::from_iter(
            self.pairs().map(|(key, v)| (key.to_string(), value(v))),
        ))
    }
}

/// An expression that matches whole names only.
pub(super) fn whole(expression: &str) -> Result<Regex, regex_lite::Error> {
    Regex::new(expression)?;
    Regex::new(&format!("^(?:{expression})$"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The cases as `peft.utils.other.get_pattern_key` answers them.
    #[test]
    fn names_match_as_in_peft() {
        let pairs = [
            ("attention.dense", 1),
            (r"layers\.1\..*", 2),
            ("^transformer.layers.0.mlp.dense_h_to_4h", 3),
            ("h_to_4h", 4),
            ("(query|key)_key_value", 5),
        ];
        let patterns = Patterns::new(pairs.map(|(k, v)| (k.to_string(), v))).unwrap();
        for (name, value) in [
            ("transformer.layers.0.attention.dense", Some(1)),
            ("transformer.layers.1.attention.dense", Some(1)),
            ("transformer.layers.1.mlp.dense_h_to_4h", Some(2)),
            ("transformer.layers.11.mlp.dense_4h_to_h", None),
            ("transformer.layers.0.mlp.dense_h_to_4h", Some(3)),
            ("transformer.layers.2.mlp.dense_h_to_4h", None),
            ("transformer.layers.2.attention.query_key_value", Some(5)),
            ("attention.dense", Some(1)),
        ] {
            assert_eq!(patterns.get(name), value, "{name}");
        }
        assert!(Patterns::new([("a)|(b".to_string(), 1)]).is_err());
        assert!(Patterns::new([("(?=x)".to_string(), 1)]).is_err());
    }
}
