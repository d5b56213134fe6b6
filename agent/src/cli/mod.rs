//! The commands that ask a running agent or read manifests; the terminal side of `weft`.

mod agent;
mod ca;
pub mod client;
mod observe;
mod policy;
mod request;
mod rows;
mod table;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::args::{Cli, Command, Output, QueryArgs, usage_sentence};
use crate::observe::tables::{
    CertRow, ConnectionRow, IdentityRow, PolicyRow, ServiceRow, Status, Table, WorkloadRow,
};

/// Done, or the answer is yes.
pub const DONE: u8 = 0;
/// The answer is no, or something failed.
pub const NO: u8 = 1;
/// The command was called wrongly.
pub const USAGE: u8 = 2;

/// A command that could not be carried out, with the exit code that fits.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    error: anyhow::Error,
}

impl Failure {
    /// The arguments make no sense.
    pub fn usage(error: impl Into<anyhow::Error>) -> Failure {
        Failure { code: USAGE, error: error.into() }
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure { code: NO, error: error.into() }
    }
}

/// The whole process: parses the command line, carries it out, says on stderr what went wrong.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are no errors and go to stdout as clap writes them.
        Err(error) if !error.use_stderr() => {
            let _ = error.print();
            return ExitCode::from(DONE);
        }
        Err(error) => {
            eprintln!("weft: {}", usage_sentence(&error));
            return ExitCode::from(USAGE);
        }
    };
    match carry_out(cli.command) {
        Ok(code) => ExitCode::from(code),
        // `weft ... | head` closes the pipe; that is no failure.
        Err(failure) if is_closed_pipe(&failure.error) => ExitCode::from(DONE),
        Err(Failure { code, error }) => {
            eprintln!("weft: {}", format!("{error:#}").replace('\n', "; "));
            ExitCode::from(code)
        }
    }
}

fn carry_out(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Status(query) => {
            let status: Status = ask(&query, Table::Status)?;
            print(&query, &status, || rows::status(&status))
        }
        Command::Workloads(query) => list::<WorkloadRow>(&query, Table::Workloads),
        Command::Services(query) => list::<ServiceRow>(&query, Table::Services),
        Command::Identities(query) => list::<IdentityRow>(&query, Table::Identities),
        Command::Policies(query) => list::<PolicyRow>(&query, Table::Policies),
        Command::Connections(query) => list::<ConnectionRow>(&query, Table::Connections),
        Command::Certs(query) => list::<CertRow>(&query, Table::Certs),
        Command::Ca(command) => ca::run(&command),
        Command::Observe(args) => observe::run(&args),
        Command::Agent(args) => agent::agent(&args),
        Command::Policy(command) => policy::run(&command),
        Command::Detach(args) => agent::detach(&args),
    }
}

fn list<R: DeserializeOwned + Serialize + rows::Row>(query: &QueryArgs, table: Table) -> Result<u8, Failure> {
    let rows: Vec<R> = ask(query, table)?;
    print(query, &rows, || rows::list(&rows))
}

fn ask<T: DeserializeOwned>(query: &QueryArgs, table: Table) -> anyhow::Result<T> {
    client::block_on(client::show(&query.admin_socket, table))
}

fn print<T: Serialize>(query: &QueryArgs, value: &T, table: impl Fn() -> String) -> Result<u8, Failure> {
    let text = match query.output.output {
        Output::Table => table(),
        Output::Json => serde_json::to_string_pretty(value)? + "\n",
    };
    io::stdout().write_all(text.as_bytes())?;
    Ok(DONE)
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
