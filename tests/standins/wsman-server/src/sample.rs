//! A world of a few objects, to try the server itself without Hyper-V: disks with properties of every kind, a service
//! with methods, an association between them.

use crate::schema::{ClassSchema, Member, MethodSchema, Table};
use parking_lot::Mutex;
use std::sync::Arc;
use vmtide_cim::{
    Association, Cim, CimError, CimInstance, CimType, CimValue, MethodOutput, ObjectPath, Result,
    VIRTUALIZATION_NAMESPACE,
};

/// `WBEM_E_INVALID_QUERY`.
const INVALID_QUERY: u32 = 0x8004_1017;
/// `WBEM_E_INVALID_CLASS`.
const INVALID_CLASS: u32 = 0x8004_1010;

/// The classes of the sample world.
pub fn schema() -> Table {
    let disk = ClassSchema {
        name: "Sample_Disk".into(),
        properties: vec![
            Member::new("InstanceID", CimType::String).required(),
            Member::new("Size", CimType::Uint64),
            Member::new("Enabled", CimType::Boolean),
            Member::new("Created", CimType::DateTime),
            Member::new("Tags", CimType::String).array(),
            Member::new("Offsets", CimType::Uint64).array(),
            Member::new("Parent", CimType::Reference),
            Member::new("Comment", CimType::String),
        ],
        methods: Vec::new(),
    };
    let service = ClassSchema {
        name: "Sample_Service".into(),
        properties: vec![
            Member::new("CreationClassName", CimType::String).required(),
            Member::new("Name", CimType::String).required(),
        ],
        methods: vec![
            MethodSchema {
                name: "Echo".into(),
                inputs: vec![
                    Member::new("Disk", CimType::Reference).required(),
                    Member::new("Settings", CimType::String),
                    Member::new("Kind", CimType::Uint16),
                    Member::new("Offsets", CimType::Uint64).array(),
                    Member::new("Flag", CimType::Boolean),
                ],
                outputs: vec![
                    Member::new("Disk", CimType::Reference),
                    Member::new("Settings", CimType::String),
                    Member::new("Kind", CimType::Uint16),
                    Member::new("Offsets", CimType::Uint64).array(),
                    Member::new("Flag", CimType::Boolean),
                    Member::new("Job", CimType::Reference),
                ],
            },
            MethodSchema {
                name: "Count".into(),
                inputs: Vec::new(),
                outputs: vec![Member::new("Calls", CimType::Uint32)],
            },
        ],
    };
    let link = ClassSchema {
        name: "Sample_ServiceDisk".into(),
        properties: vec![
            Member::new("Antecedent", CimType::Reference).required(),
            Member::new("Dependent", CimType::Reference).required(),
        ],
        methods: Vec::new(),
    };
    Table(vec![disk, service, link])
}

/// The sample world.
pub struct World {
    disks: Vec<CimInstance>,
    service: CimInstance,
    calls: Mutex<u32>,
}

impl World {
    /// A world of `count` disks. Their comments make answers long: about 1 KiB each.
    pub fn new(count: usize) -> Arc<Self> {
        let disks = (0..count).map(disk).collect();
        let keys = [("CreationClassName", "Sample_Service"), ("Name", "sample")];
        let mut service = CimInstance::new("Sample_Service");
        for (name, value) in keys {
            service.set(name, value);
        }
        service.path = Some(ObjectPath::new("Sample_Service", &keys));
        Arc::new(Self { disks, service, calls: Mutex::new(0) })
    }

    /// How many methods were called.
    pub fn calls(&self) -> u32 {
        *self.calls.lock()
    }

    fn links(&self) -> Vec<CimInstance> {
        let service = self.service.path.clone().unwrap_or_default();
        let link = |disk: &CimInstance| {
            CimInstance::new("Sample_ServiceDisk")
                .with("Antecedent", &service)
                .with("Dependent", &disk.path.clone().unwrap_or_default())
        };
        self.disks.iter().map(link).collect()
    }
}

fn disk(number: usize) -> CimInstance {
    let id = format!(r"Sample:disk\{number}");
    let size = u64::try_from(number).unwrap_or(0).saturating_mul(1 << 40);
    let mut disk = CimInstance::new("Sample_Disk")
        .with("InstanceID", id.as_str())
        .with("Size", CimValue::Uint64(size))
        .with("Enabled", number.is_multiple_of(2))
        .with("Created", CimValue::DateTime("20261121120000.000000+000".into()))
        .with("Tags", CimValue::strings(["<first>", "zweites & drittes", "日本語"]))
        .with("Offsets", CimValue::Array(CimType::Uint64, vec![CimValue::Uint64(u64::MAX)]))
        .with("Comment", "c".repeat(1024));
    if number > 0 {
        let parent = format!(r"Sample:disk\{}", number - 1);
        disk.set("Parent", &ObjectPath::new("Sample_Disk", &[("InstanceID", &parent)]));
    }
    disk.path = Some(ObjectPath::new("Sample_Disk", &[("InstanceID", &id)]));
    disk
}

impl Cim for World {
    fn peer(&self) -> &str {
        "the sample world"
    }

    fn query(&self, namespace: &str, wql: &str) -> Result<Vec<CimInstance>> {
        let refused = |code: u32, detail: &str| CimError::Fault {
            action: wql.to_owned(),
            detail: detail.to_owned(),
            code: Some(code),
        };
        if namespace != VIRTUALIZATION_NAMESPACE {
            return Err(CimError::NotFound {
                what: namespace.into(),
                detail: "no such namespace".into(),
            });
        }
        let invalid = || refused(INVALID_QUERY, "only SELECT … FROM CLASS [WHERE A = 'B' [AND …]]");
        let (head, conditions) = match wql.split_once(" WHERE ") {
            Some((head, conditions)) => (head, conditions.split(" AND ").collect()),
            None => (wql, Vec::new()),
        };
        let words: Vec<&str> = head.split_whitespace().collect();
        let ["SELECT" | "select", columns, "FROM" | "from", class] = words.as_slice() else {
            return Err(invalid());
        };
        let mut found: Vec<CimInstance> = match *class {
            "Sample_Disk" => self.disks.clone(),
            "Sample_Service" => vec![self.service.clone()],
            "Sample_ServiceDisk" => self.links(),
            _ => return Err(refused(INVALID_CLASS, "no such class")),
        };
        for condition in conditions {
            let (name, value) = condition.split_once(" = ").ok_or_else(invalid)?;
            let value = value
                .strip_prefix('\'')
                .and_then(|rest| rest.strip_suffix('\''))
                .ok_or_else(invalid)?;
            let value = value.replace(r"\\", r"\");
            found
                .retain(|instance| instance.value(name).and_then(CimValue::as_str) == Some(&value));
        }
        if *columns != "*" {
            let columns: Vec<&str> = columns.split(',').collect();
            for instance in &mut found {
                instance.properties.retain(|(name, _)| columns.contains(&name.as_str()));
            }
        }
        Ok(found)
    }

    fn get(&self, path: &ObjectPath) -> Result<CimInstance> {
        let all = self.disks.iter().chain([&self.service]);
        let found = all.into_iter().find(|instance| instance.path.as_ref() == Some(path));
        found.cloned().ok_or_else(|| CimError::NotFound {
            what: path.to_string(),
            detail: "no instance has these keys".into(),
        })
    }

    fn associators(
        &self,
        path: &ObjectPath,
        association: &Association,
    ) -> Result<Vec<CimInstance>> {
        let wanted =
            |class: &str| association.result_class.as_deref().is_none_or(|name| name == class);
        Ok(match path.class.as_str() {
            "Sample_Service" if wanted("Sample_Disk") => self.disks.clone(),
            "Sample_Disk" if wanted("Sample_Service") => vec![self.service.clone()],
            _ => Vec::new(),
        })
    }

    fn references(
        &self,
        path: &ObjectPath,
        _association: &Association,
    ) -> Result<Vec<CimInstance>> {
        let mut links = self.links();
        links.retain(|link| {
            link.properties.iter().any(|(_, value)| value.as_reference().as_ref() == Some(path))
        });
        Ok(links)
    }

    fn invoke(
        &self,
        path: &ObjectPath,
        method: &str,
        parameters: &[(&str, CimValue)],
    ) -> Result<MethodOutput> {
        self.get(path)?;
        let mut calls = self.calls.lock();
        *calls += 1;
        let mut output = MethodOutput::default();
        if method == "Count" {
            output.parameters.set("Calls", CimValue::Uint32(*calls));
            return Ok(output);
        }
        for (name, value) in parameters {
            output.parameters.set(name, value.clone());
        }
        output.return_value = 4096;
        Ok(output)
    }
}
