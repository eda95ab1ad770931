//! `vmtide repair`: make right what is damaged in a repository, as far as nothing is lost by it.

use crate::app::App;
use crate::commands::verify::{show_damage, with_partitions};
use crate::exit::Exit;
use crate::{repository, units};
use clap::Args;
use vmtide_engine::{LocatedDamage, Result, locate_damage, repair};
use vmtide_repo::{RepairOptions, RepairReport};

const EXAMPLES: &str = "\
Makes the index anew where it is damaged or lost, takes off the record what is sound after all, and
stores damaged data once more from where the repository has it a second time, or from another
repository. Removes nothing that anybody can still read; it may run beside backups and restores.

Examples:
  vmtide repair -r /backup --dry-run
  vmtide repair -r /backup
  vmtide repair -r /backup --from /mnt/second          also from another repository with the same VMs
  vmtide repair -r /backup --remove-unreadable         restore points that nobody can read any more

The password of the other repository comes from --from-password-file, or is the same.
Ends with code 5 while anything is still damaged.";

/// The options of `repair`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct RepairArgs {
    /// Another repository to take damaged data from; its keys may be others
    #[arg(long, value_name = "REPO")]
    from: Option<String>,
    /// Read the password of the other repository from this file
    #[arg(long, value_name = "FILE", requires = "from")]
    from_password_file: Option<std::path::PathBuf>,
    /// Remove restore points and records that nobody can read any more. `prune` does not run while
    /// they are there
    #[arg(long)]
    remove_unreadable: bool,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

/// Repairs.
pub fn run(app: &App, args: &RepairArgs) -> Result<Exit> {
    let repository = repository::open(app)?;
    let from = match &args.from {
        None => None,
        Some(location) => {
            let file = args.from_password_file.as_deref();
            Some(repository::open_other(app, location, file)?)
        }
    };
    let options = RepairOptions {
        dry_run: args.dry_run,
        remove_unreadable: args.remove_unreadable,
        from: from.as_ref(),
    };
    let job = app.begin_job()?;
    let (report, damage) = job.run(app, |context| {
        let report = repair(&repository, &options, context)?;
        let damage = locate_damage(&repository, &report.damage, context.cancel);
        Ok((report, damage))
    })?;
    show(app, &report, &damage, args);
    app.output.summary(&with_partitions(&report, &damage));
    Ok(if report.damage.is_empty() { Exit::Done } else { Exit::Damaged })
}

fn show(app: &App, report: &RepairReport, damage: &[LocatedDamage], args: &RepairArgs) {
    let output = &app.output;
    let would = if report.dry_run { "would be " } else { "" };
    if let Some(reason) = &report.index_rebuilt {
        output.line(format!("index {would}made anew: {reason}"));
        if report.packs_unreadable > 0 {
            output.line(format!("{} packs could not be read for it", report.packs_unreadable));
        }
    }
    if report.recovered > 0 {
        output.line(format!("{} damaged parts are sound after all", report.recovered));
    }
    if report.healed_bytes > 0 {
        output.line(format!("{} {would}healed", units::size(report.healed_bytes)));
    }
    for object in &report.removed {
        output.line(format!("{object} {would}removed: nobody can read it"));
    }
    damage.iter().for_each(|damage| show_damage(app, damage));
    if !report.unreadable.is_empty() {
        output.remark(format!(
            "{} objects cannot be read by anybody any more; --remove-unreadable removes them",
            report.unreadable.len()
        ));
    }
    let touches_data = report.damage.iter().any(|damage| !damage.places.is_empty());
    if touches_data && args.from.is_none() {
        output.remark(
            "the next backup of these VMs heals what has not changed on them since; --from REPO takes \
             it from another repository; `restore --salvage` restores the rest",
        );
    }
    if report.damage.is_empty() {
        output.line("no damage is left");
    }
}
