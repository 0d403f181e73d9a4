//! Does it survive? Truncated, hostile and contradictory files, a full disk: each ends in one clear line, nothing lost.

mod cases;
mod disk;
mod files;
mod folders;
mod kills;
mod merging;
#[path = "../common/program.rs"]
mod program;
mod results;
mod runs;
mod spoil;

/// The message of a failure: one line that holds every one of `words`.
#[track_caller]
fn refused<T>(result: glmtune::error::Result<T>, words: &[&str]) {
    let message = match result {
        Ok(_) => panic!("accepted; expected a message with {words:?}"),
        Err(e) => e.to_string(),
    };
    assert!(!message.contains('\n'), "more than one line: {message}");
    for word in words {
        assert!(message.contains(word), "no {word:?} in: {message}");
    }
}
