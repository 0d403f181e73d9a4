//! The `glmtune` program.

fn main() -> std::process::ExitCode {
    glmtune::cli::main()
}
