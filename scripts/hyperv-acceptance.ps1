<#
.SYNOPSIS
Asks a real Hyper-V host what its documents leave open, with a throw-away VM, and writes a report.

.DESCRIPTION
vmtide was built from Microsoft's documents, without a Windows host. This script makes a VM of its own (no network, two small disks),
runs the calls that vmtide runs, in their order, and the events that change tracking must survive, and writes down what came. It
changes no other VM, and removes what it made, also after an error. It needs Windows PowerShell 5.1, the Hyper-V module, and an
administrator of the host. It takes some ten minutes, and 5 GiB of disk. hyperv-acceptance-parts.ps1 must lie beside it.

Every question has one of these outcomes:
  as-assumed   vmtide's assumption holds
  otherwise    it does not: please send the report
  told         there was no assumption; the answer is in the report
  failed       the question could not be asked

.PARAMETER Directory
A new directory for the VM; it must not exist, and is removed at the end.

.PARAMETER Report
Where the report goes, without extension: .json and .txt are added.

.PARAMETER GuestDisk
The VHDX of a Windows guest, which is copied: with it the questions that need a guest are asked, too (writes from inside, application
consistency). Its administrator is GuestCredential.

.PARAMETER GuestCredential
An administrator in the guest, for PowerShell Direct.

.PARAMETER Vmtide
The path of vmtide.exe: with it the throw-away VM is looked over, backed up in full and incrementally, and restored by both routes;
the restored disks are compared byte by byte. Everything of it lies in Directory.

.PARAMETER Cycles
How many cycles of write, freeze, copy what is told, compare the hash of the whole disk; each way of keeping an id has as many. They
need GuestDisk. 100 take some hours.

.EXAMPLE
powershell -ExecutionPolicy Bypass -File hyperv-acceptance.ps1 -Directory D:\vmtide-acceptance -Report D:\report
#>
[CmdletBinding()]
param(
    [Parameter(Mandatory = $true)][string]$Directory,
    [Parameter(Mandatory = $true)][string]$Report,
    [string]$GuestDisk,
    [System.Management.Automation.PSCredential]$GuestCredential,
    [string]$Vmtide,
    [int]$Cycles = 0
)

Set-StrictMode -Version 2.0
$ErrorActionPreference = 'Stop'

$Namespace = 'root\virtualization\v2'
$VmName = 'vmtide-acceptance-' + [guid]::NewGuid().ToString('N').Substring(0, 8)
$RecoverySnapshot = [uint16]32768
$JobTimeoutSeconds = 600
$Started = Get-Date
$Answers = New-Object System.Collections.ArrayList

. (Join-Path $PSScriptRoot 'hyperv-acceptance-parts.ps1')

# --- The report ---------------------------------------------------------------------------------------------------------

function Add-Answer([string]$Question, [string]$Outcome, $Found, [string]$Assumed) {
    $answer = New-Object psobject -Property @{
        question = $Question; outcome = $Outcome; found = $Found; assumed = $Assumed
        seconds = [math]::Round(((Get-Date) - $Started).TotalSeconds, 1)
    }
    [void]$Answers.Add($answer)
    Write-Host ('{0,-11} {1}' -f $Outcome, $Question)
}

# Runs one question. The block answers with a hash table: found, and holds (true, false, or $null where nothing was assumed).
function Test-Question([string]$Question, [string]$Assumed, [scriptblock]$Ask) {
    try {
        $result = & $Ask
        $outcome = 'told'
        if ($result.holds -eq $true) { $outcome = 'as-assumed' }
        if ($result.holds -eq $false) { $outcome = 'otherwise' }
        Add-Answer $Question $outcome $result.found $Assumed
    } catch {
        Add-Answer $Question 'failed' $_.Exception.Message $Assumed
    }
}

function Save-Report {
    $system = Get-CimInstance -ClassName Win32_OperatingSystem
    $document = @{
        tool = 'vmtide hyperv-acceptance 2'
        started = $Started.ToUniversalTime().ToString('o')
        windows = @{ caption = $system.Caption; version = $system.Version; build = $system.BuildNumber }
        powershell = $PSVersionTable.PSVersion.ToString()
        answers = $Answers
    }
    $document | ConvertTo-Json -Depth 8 | Set-Content -Path ($Report + '.json') -Encoding UTF8
    $lines = @('vmtide on ' + $system.Caption + ', build ' + $system.BuildNumber, '')
    foreach ($answer in $Answers) {
        $lines += '[' + $answer.outcome + '] ' + $answer.question
        if ($answer.assumed) { $lines += '    assumed: ' + $answer.assumed }
        $lines += '    found:   ' + (ConvertTo-Json -InputObject $answer.found -Depth 6 -Compress)
    }
    $lines | Set-Content -Path ($Report + '.txt') -Encoding UTF8
    Write-Host ''
    Write-Host ('The report is in ' + $Report + '.json and ' + $Report + '.txt')
}

# --- Calls --------------------------------------------------------------------------------------------------------------

function Get-HostService([string]$Class) {
    Get-CimInstance -Namespace $Namespace -ClassName $Class
}

# An instance as the text that parameters with embedded instances take.
function ConvertTo-Embedded([string]$Class, [hashtable]$Properties) {
    $definition = Get-CimClass -Namespace $Namespace -ClassName $Class
    $instance = New-CimInstance -CimClass $definition -Property $Properties -ClientOnly
    $serializer = [Microsoft.Management.Infrastructure.Serialization.CimSerializer]::Create()
    $bytes = $serializer.Serialize($instance, [Microsoft.Management.Infrastructure.Serialization.InstanceSerializationOptions]::None)
    [System.Text.Encoding]::Unicode.GetString($bytes)
}

# Waits for a method's job. Answers with its end; jobs of the host live some minutes after it.
function Wait-HostJob([object]$Result) {
    $end = @{ returned = [uint32]$Result.ReturnValue; state = $null; error_code = $null; error = $null; seconds = 0 }
    if ($Result.ReturnValue -ne 4096) { return $end }
    $begun = Get-Date
    do {
        Start-Sleep -Milliseconds 250
        $job = Get-CimInstance -InputObject $Result.Job
        if (((Get-Date) - $begun).TotalSeconds -gt $JobTimeoutSeconds) { throw 'a job of the host does not end' }
    } while ($job.JobState -in 2, 3, 4, 5, 6)
    $end.state = [int]$job.JobState
    $end.error_code = $job.ErrorCode
    $end.error = $job.ErrorDescription
    $end.seconds = [math]::Round(((Get-Date) - $begun).TotalSeconds, 1)
    $end
}

function Test-Done($End) {
    ($End.returned -eq 0) -or ($End.returned -eq 4096 -and $End.state -in 7, 32768)
}

function Get-System {
    Get-CimInstance -Namespace $Namespace -ClassName Msvm_ComputerSystem -Filter ("Name='" + $script:VmId + "'")
}

function Get-Settings([string]$Type) {
    Get-CimInstance -Namespace $Namespace -ClassName Msvm_VirtualSystemSettingData -Filter (
        "VirtualSystemIdentifier='" + $script:VmId + "'") | Where-Object { $_.VirtualSystemType -eq ('Microsoft:Hyper-V:' + $Type) }
}

function Get-ReferencePoints {
    @(Get-CimInstance -Namespace $Namespace -ClassName Msvm_VirtualSystemReferencePoint |
        Where-Object { $_.VirtualSystemIdentifier -eq $script:VmId })
}

# The files of the disks of a VM or checkpoint, in the order of their InstanceIDs.
function Get-DiskPaths($Settings) {
    $guid = $Settings.InstanceID
    @(Get-CimInstance -Namespace $Namespace -ClassName Msvm_StorageAllocationSettingData |
        Where-Object { $_.ResourceSubType -eq 'Microsoft:Hyper-V:Virtual Hard Disk' -and $_.InstanceID.StartsWith($guid + '\') } |
        Sort-Object -Property InstanceID | ForEach-Object { $_.HostResource[0] })
}

function New-RecoveryCheckpoint([int]$Consistency, [int]$BackupType = 2) {
    $settings = ConvertTo-Embedded 'Msvm_VirtualSystemSnapshotSettingData' @{
        ConsistencyLevel = [byte]$Consistency; GuestBackupType = [byte]$BackupType; IgnoreNonSnapshottableDisks = $false
    }
    $service = Get-HostService 'Msvm_VirtualSystemSnapshotService'
    $result = Invoke-CimMethod -InputObject $service -MethodName CreateSnapshot -Arguments @{
        AffectedSystem = (Get-System); SnapshotSettings = $settings; SnapshotType = $RecoverySnapshot
    }
    Wait-HostJob $result
}

# Recovery checkpoint, conversion, the new reference point, and how long the merge took.
function New-ReferencePoint {
    $before = @(Get-ReferencePoints | ForEach-Object { $_.InstanceID })
    $made = New-RecoveryCheckpoint 2
    if (-not (Test-Done $made)) { throw ('no checkpoint: ' + (ConvertTo-Json $made -Compress)) }
    $snapshot = Get-Settings 'Snapshot:Recovery' | Select-Object -First 1
    $service = Get-HostService 'Msvm_VirtualSystemSnapshotService'
    $result = Invoke-CimMethod -InputObject $service -MethodName ConvertToReferencePoint -Arguments @{ AffectedSnapshot = $snapshot }
    $named = ($null -ne $result.PSObject.Properties['ResultingReferencePoint']) -and ($null -ne $result.ResultingReferencePoint)
    $end = Wait-HostJob $result
    if (-not (Test-Done $end)) { throw ('no conversion: ' + (ConvertTo-Json $end -Compress)) }
    $merge = Wait-Merge
    $points = @(Get-ReferencePoints | Where-Object { $_.InstanceID -notin $before })
    @{ point = ($points | Select-Object -First 1); count = $points.Count; named = $named; conversion = $end; merge_seconds = $merge }
}

# Until no disk of the VM is an AVHDX. Answers with the seconds.
function Wait-Merge {
    $begun = Get-Date
    while (@(Get-DiskPaths (Get-Settings 'System:Realized') | Where-Object { $_ -like '*.avhdx' }).Count -gt 0) {
        if (((Get-Date) - $begun).TotalSeconds -gt $JobTimeoutSeconds) { throw 'the disks are not merged' }
        Start-Sleep -Milliseconds 250
    }
    [math]::Round(((Get-Date) - $begun).TotalSeconds, 1)
}

# The changes of a disk since an id: what vmtide asks, to the end.
function Get-DiskChanges([string]$Path, [string]$Id, [uint64]$Length) {
    $service = Get-HostService 'Msvm_ImageManagementService'
    $ranges = @()
    $offset = [uint64]0
    $answers = 0
    while ($offset -lt $Length) {
        $result = Invoke-CimMethod -InputObject $service -MethodName GetVirtualDiskChanges -Arguments @{
            Path = $Path; LimitId = $Id; TargetSnapshotId = ''; ByteOffset = $offset; ByteLength = [uint64]($Length - $offset)
        }
        $end = Wait-HostJob $result
        $answers++
        if (-not (Test-Done $end)) { return @{ ok = $false; end = $end; ranges = $ranges; answers = $answers } }
        if ($result.ProcessedByteLength -eq 0) { return @{ ok = $false; end = 'processed 0 bytes'; ranges = $ranges; answers = $answers } }
        for ($i = 0; $i -lt @($result.ChangedByteOffsets).Count; $i++) {
            $ranges += , @([uint64]@($result.ChangedByteOffsets)[$i], [uint64]@($result.ChangedByteLengths)[$i])
        }
        $offset += $result.ProcessedByteLength
    }
    @{ ok = $true; ranges = $ranges; answers = $answers }
}

# .NET's FileStream opens no devices by name, but takes their handles. Also sent to the guest, as text.
$RawDisk = @'
using System; using System.IO; using System.Runtime.InteropServices; using Microsoft.Win32.SafeHandles;
public static class VmtideRawDisk {
    [DllImport("kernel32.dll", CharSet = CharSet.Unicode, SetLastError = true)]
    static extern SafeFileHandle CreateFile(string name, uint access, uint share, IntPtr security, uint how, uint flags, IntPtr template);
    public static void Write(int number, long offset, byte[] data) {
        SafeFileHandle handle = CreateFile("\\\\.\\PhysicalDrive" + number, 0xC0000000, 3, IntPtr.Zero, 3, 0x80000000, IntPtr.Zero);
        if (handle.IsInvalid) throw new System.ComponentModel.Win32Exception(Marshal.GetLastWin32Error());
        using (FileStream stream = new FileStream(handle, FileAccess.ReadWrite, 1)) {
            stream.Seek(offset, SeekOrigin.Begin);
            stream.Write(data, 0, data.Length);
            stream.Flush();
        }
    }
}
'@

# Writes bytes to a disk of the VM that is off, attached to the host, at these offsets.
function Write-Offline([string]$Path, [uint64[]]$Offsets, [int]$Length) {
    $attached = Mount-VHD -Path $Path -NoDriveLetter -Passthru
    try {
        $number = ($attached | Get-Disk).Number
        Set-Disk -Number $number -IsOffline $true
        $bytes = New-Object byte[] $Length
        (New-Object System.Random 1).NextBytes($bytes)
        foreach ($offset in $Offsets) { [VmtideRawDisk]::Write($number, [int64]$offset, $bytes) }
    } finally { Dismount-VHD -Path $Path }
}

function Test-Covered($Ranges, [uint64]$Offset, [uint64]$Length) {
    foreach ($range in $Ranges) {
        if ($range[0] -le $Offset -and ($range[0] + $range[1]) -ge ($Offset + $Length)) { return $true }
    }
    $false
}

# --- The throw-away VM --------------------------------------------------------------------------------------------------

function New-ThrowAwayVm {
    if (Test-Path $Directory) { throw ($Directory + ' exists: give a new directory') }
    [void](New-Item -ItemType Directory -Path $Directory)
    $script:IsOurs = $true
    $disks = Join-Path $Directory 'disks'
    [void](New-Item -ItemType Directory -Path $disks)
    $first = Join-Path $disks 'first.vhdx'
    if ($GuestDisk) { Copy-Item -Path $GuestDisk -Destination $first } else { [void](New-VHD -Path $first -Dynamic -SizeBytes 2GB) }
    $second = Join-Path $disks 'second.vhdx'
    [void](New-VHD -Path $second -Dynamic -SizeBytes 1GB)
    $vm = New-VM -Name $VmName -Generation 2 -MemoryStartupBytes 1GB -VHDPath $first -Path $Directory
    $script:VmId = $vm.Id.ToString().ToUpperInvariant()
    Add-VMHardDiskDrive -VM $vm -ControllerType SCSI -Path $second
    Get-VMNetworkAdapter -VM $vm | Disconnect-VMNetworkAdapter
    Set-VM -VM $vm -AutomaticCheckpointsEnabled $false -CheckpointType Production -ErrorAction SilentlyContinue
    $script:First = $first
    $script:Second = $second
    Start-VM -VM $vm
}

function Remove-ThrowAwayVm {
    if (-not $script:IsOurs) { return }
    Remove-Restored
    $vm = Get-VM -Name $VmName -ErrorAction SilentlyContinue
    if ($vm) {
        Stop-VM -VM $vm -TurnOff -Force -ErrorAction SilentlyContinue
        Get-VMSnapshot -VM $vm -ErrorAction SilentlyContinue | Remove-VMSnapshot -IncludeAllChildSnapshots -ErrorAction SilentlyContinue
        $service = Get-HostService 'Msvm_VirtualSystemReferencePointService'
        foreach ($point in Get-ReferencePoints) {
            $result = Invoke-CimMethod -InputObject $service -MethodName DestroyReferencePoint -Arguments @{ AffectedReferencePoint = $point }
            [void](Wait-HostJob $result)
        }
        Start-Sleep -Seconds 2
        Remove-VM -VM $vm -Force
    }
    Remove-Item -Path $Directory -Recurse -Force
}

# --- The questions ------------------------------------------------------------------------------------------------------

function Test-Host {
    Test-Question 'What does the host say of itself?' '' {
        $computer = Get-CimInstance -Namespace $Namespace -ClassName Msvm_ComputerSystem |
            Where-Object { $_.Name -eq $env:COMPUTERNAME } | Select-Object -First 1
        $class = Get-CimClass -Namespace $Namespace -ClassName Msvm_VirtualSystemSnapshotSettingData
        @{ found = @{
                caption = $computer.Caption
                supported_versions = @(Get-VMHostSupportedVersion | ForEach-Object { $_.Version.ToString() })
                snapshot_settings = @($class.CimClassProperties | ForEach-Object { $_.Name })
                culture = (Get-Culture).Name
            }; holds = $null }
    }
    Test-Question 'How large may answers of WinRM be?' 'at least 150 KB' {
        $found = [int](Get-Item -Path 'WSMan:\localhost\MaxEnvelopeSizekb').Value
        @{ found = $found; holds = ($found -ge 150) }
    }
    Test-Question 'Does SMB here have 3.1.1, signing and encryption?' 'encryption is not refused to those who ask for it' {
        $server = Get-SmbServerConfiguration
        @{ found = @{
                encrypt = $server.EncryptData; reject_unencrypted = $server.RejectUnencryptedAccess
                require_signature = $server.RequireSecuritySignature
            }; holds = $null }
    }
}

function Test-Checkpoint {
    Test-Question 'Is an application-consistent checkpoint of a guest without integration services refused, clearly?' 'the job fails; it never says consistent' {
        if ($GuestDisk) { return @{ found = 'left out: there is a guest'; holds = $null } }
        $end = New-RecoveryCheckpoint 1
        $left = @(Get-Settings 'Snapshot:Recovery').Count
        if ($left -gt 0) { Get-VMSnapshot -VMName $VmName -SnapshotType Recovery | Remove-VMSnapshot; [void](Wait-Merge) }
        @{ found = @{ end = $end; checkpoints_after = $left }; holds = (-not (Test-Done $end)) }
    }
    Test-Question 'Recovery checkpoint: what does it return, and which files does it freeze?' 'the frozen files are the base files; the VM runs on AVHDX' {
        $end = New-RecoveryCheckpoint 2
        $snapshot = @(Get-Settings 'Snapshot:Recovery')
        $frozen = Get-DiskPaths $snapshot[0]
        $live = Get-DiskPaths (Get-Settings 'System:Realized')
        $script:Frozen = $frozen
        $holds = (Test-Done $end) -and $snapshot.Count -eq 1 -and @($frozen | Where-Object { $_ -like '*.avhdx' }).Count -eq 0 -and
            @($live | Where-Object { $_ -notlike '*.avhdx' }).Count -eq 0
        @{ found = @{ end = $end; instance_id = $snapshot[0].InstanceID; frozen = $frozen; live = $live; element_name = $snapshot[0].ElementName }; holds = $holds }
    }
    Test-Question 'What does the job of a checkpoint tell of its kind, its times, its results and who asked?' 'JobType 70, times around CreationTime, a row of Msvm_AffectedJobElement for the checkpoint and one for the VM' {
        $snapshot = Get-Settings 'Snapshot:Recovery' | Select-Object -First 1
        $job = Get-CimInstance -Namespace $Namespace -ClassName Msvm_ConcreteJob | Where-Object { $_.JobType -in 0, 70, 170 } |
            Sort-Object -Property StartTime | Select-Object -Last 1
        $rows = @(Get-CimInstance -Namespace $Namespace -ClassName Msvm_AffectedJobElement |
            Where-Object { $null -ne $job -and $_.AffectingElement.InstanceID -eq $job.InstanceID })
        $elements = @($rows | ForEach-Object { @{ element = [string]$_.AffectedElement; effects = @($_.ElementEffects) } })
        $holds = $null -ne $job -and $job.JobType -eq 70 -and @($rows | Where-Object { 5 -in $_.ElementEffects }).Count -eq 1 -and
            $job.StartTime -le $snapshot.CreationTime.AddSeconds(1) -and $job.TimeOfLastStateChange -ge $snapshot.CreationTime.AddSeconds(-1)
        @{ found = @{
                type = $job.JobType; has_owner = -not [string]::IsNullOrEmpty($job.Owner); name = $job.Name; submitted = [string]$job.TimeSubmitted
                begun = [string]$job.StartTime; changed = [string]$job.TimeOfLastStateChange; created = [string]$snapshot.CreationTime
                elements = $elements
            }; holds = $holds }
    }
    Test-Question 'Can the frozen files be opened for reading while writers are kept out?' 'yes: that is how they are read over SMB' {
        $found = @{}
        foreach ($share in 'Read', 'ReadWrite', 'None') {
            try {
                $stream = New-Object System.IO.FileStream -ArgumentList $script:Frozen[0], 'Open', 'Read', $share
                $bytes = New-Object byte[] 8
                [void]$stream.Read($bytes, 0, 8)
                $stream.Dispose()
                $found[$share] = [System.Text.Encoding]::ASCII.GetString($bytes)
            } catch { $found[$share] = $_.Exception.Message }
        }
        @{ found = $found; holds = ($found['Read'] -eq 'vhdxfile') }
    }
    Test-Question 'Is the live AVHDX closed to readers?' 'a sharing violation' {
        $live = @(Get-DiskPaths (Get-Settings 'System:Realized'))[0]
        try {
            (New-Object System.IO.FileStream -ArgumentList $live, 'Open', 'Read', 'Read').Dispose()
            @{ found = 'opened'; holds = $false }
        } catch { @{ found = $_.Exception.Message; holds = $true } }
    }
    Test-Question 'May the frozen checkpoint be renamed?' 'ModifySystemSettings takes ElementName' {
        $snapshot = Get-Settings 'Snapshot:Recovery' | Select-Object -First 1
        $snapshot.ElementName = 'vmtide acceptance'
        $serializer = [Microsoft.Management.Infrastructure.Serialization.CimSerializer]::Create()
        $none = [Microsoft.Management.Infrastructure.Serialization.InstanceSerializationOptions]::None
        $text = [System.Text.Encoding]::Unicode.GetString($serializer.Serialize($snapshot, $none))
        $service = Get-HostService 'Msvm_VirtualSystemManagementService'
        $end = Wait-HostJob (Invoke-CimMethod -InputObject $service -MethodName ModifySystemSettings -Arguments @{ SystemSettings = $text })
        $name = (Get-Settings 'Snapshot:Recovery' | Select-Object -First 1).ElementName
        @{ found = @{ end = $end; name = $name }; holds = ($name -eq 'vmtide acceptance') }
    }
    Test-Question 'Is the checkpoint removed by Remove-VMSnapshot, and merged?' 'yes' {
        Get-VMSnapshot -VMName $VmName -SnapshotType Recovery | Remove-VMSnapshot
        $seconds = Wait-Merge
        @{ found = @{ merge_seconds = $seconds }; holds = (@(Get-Settings 'Snapshot:Recovery').Count -eq 0) }
    }
}

function Test-ReferencePoint {
    Test-Question 'Reference point: what is it called, of which type, with which ids?' 'type 2, one id per disk beginning rctX:' {
        $made = New-ReferencePoint
        $point = $made.point
        $ids = @($point.ResilientChangeTrackingIdentifiers)
        $script:Base = $ids
        $script:BaseDisks = @($point.VirtualDiskIdentifiers)
        $holds = $made.count -eq 1 -and $point.ReferencePointType -eq 2 -and $ids.Count -eq 2 -and
            @($ids | Where-Object { $_ -notlike 'rctX:*' }).Count -eq 0
        @{ found = @{
                instance_id = $point.InstanceID; type = $point.ReferencePointType; consistency = $point.ConsistencyLevel
                ids = $ids; disks = $script:BaseDisks; named_by_the_method = $made.named; merge_seconds = $made.merge_seconds
                conversion = $made.conversion
            }; holds = $holds }
    }
    Test-Question 'Which files does change tracking leave beside the disks?' '.rct and .mrt' {
        $files = @(Get-ChildItem -Path (Join-Path $Directory 'disks') | ForEach-Object { @{ name = $_.Name; bytes = $_.Length } })
        @{ found = $files; holds = (@($files | Where-Object { $_.name -like '*.rct' }).Count -gt 0) }
    }
    Test-Question 'Is the last part of an id counted in decimal or hexadecimal digits?' '' {
        $last = @()
        for ($i = 0; $i -lt 20; $i++) {
            $point = (New-ReferencePoint).point
            $last += @($point.ResilientChangeTrackingIdentifiers)[0].Split(':')[-1]
            $script:Newest = @($point.ResilientChangeTrackingIdentifiers)
        }
        @{ found = $last; holds = $null }
    }
    Test-Question 'Which type does CreateReferencePoint make of 1 and of 2?' '' {
        $service = Get-HostService 'Msvm_VirtualSystemReferencePointService'
        $settings = ConvertTo-Embedded 'Msvm_VirtualSystemReferencePointSettingData' @{ ConsistencyLevel = [byte]2 }
        $found = @{}
        foreach ($type in 1, 2) {
            $before = @(Get-ReferencePoints | ForEach-Object { $_.InstanceID })
            $end = Wait-HostJob (Invoke-CimMethod -InputObject $service -MethodName CreateReferencePoint -Arguments @{
                    AffectedSystem = (Get-System); ReferencePointSettings = $settings; ReferencePointType = [uint16]$type })
            $new = @(Get-ReferencePoints | Where-Object { $_.InstanceID -notin $before })
            $found["$type"] = @{ end = $end; types = @($new | ForEach-Object { $_.ReferencePointType }) }
            foreach ($point in $new) {
                [void](Wait-HostJob (Invoke-CimMethod -InputObject $service -MethodName DestroyReferencePoint -Arguments @{ AffectedReferencePoint = $point }))
            }
        }
        @{ found = $found; holds = $null }
    }
}

function Test-Changes {
    $size = (Get-VHD -Path $script:Second).Size
    Test-Question 'Are changes told, with a length of the whole disk?' 'yes, although the document says less than the disk' {
        $changes = Get-DiskChanges $script:Second $script:Newest[1] $size
        @{ found = $changes; holds = $changes.ok }
    }
    Test-Question 'Does the host tell the changes of a disk that a running VM writes?' 'only frozen disks are asked' {
        @{ found = (Get-DiskChanges $script:First $script:Newest[0] (Get-VHD -Path $script:First).Size); holds = $null }
    }
    Test-Question 'What does an id that nobody gave answer?' 'an error, never an empty list' {
        $changes = Get-DiskChanges $script:Second 'rctX:00000000:0000:0000:0000:000000000000:00000001' $size
        @{ found = $changes; holds = (-not $changes.ok) }
    }
    Test-Question 'Is an id older than the newest one still good?' 'yes, while its reference point is there' {
        $changes = Get-DiskChanges $script:Second $script:Base[1] $size
        @{ found = $changes; holds = $changes.ok }
    }
}

# What may end an id. Where it stays good although the disk was changed behind its back, what was written must be told.
function Test-Events {
    $size = (Get-VHD -Path $script:Second).Size
    $still = {
        param([string]$What, [scriptblock]$Do, [string]$Assumed, $MustBeGood)
        Test-Question ('Does an id survive: ' + $What + '?') $Assumed {
            $id = @((New-ReferencePoint).point.ResilientChangeTrackingIdentifiers)[1]
            & $Do
            $changes = Get-DiskChanges $script:Second $id ((Get-VHD -Path $script:Second).Size)
            $holds = $null
            if ($null -ne $MustBeGood) { $holds = ($changes.ok -eq $MustBeGood) }
            @{ found = @{ good = $changes.ok; changes = $changes }; holds = $holds }
        }
    }
    & $still 'turning the VM off and on' { Stop-VM -Name $VmName -TurnOff -Force; Start-VM -Name $VmName } 'yes' $true
    & $still 'saving and starting the VM' { Save-VM -Name $VmName; Start-VM -Name $VmName } 'yes' $true
    & $still 'a user checkpoint, made and removed' {
        Checkpoint-VM -Name $VmName -SnapshotName 'user'
        Remove-VMSnapshot -VMName $VmName -Name 'user'
        Start-Sleep -Seconds 2
        [void](Wait-Merge)
    } 'yes' $null
    & $still 'renaming the VM' { Rename-VM -Name $VmName -NewName ($VmName + '-b'); Rename-VM -Name ($VmName + '-b') -NewName $VmName } 'yes' $true
    & $still 'moving the disk of the running VM' {
        $to = Join-Path $Directory 'moved'
        Move-VMStorage -VMName $VmName -VHDs @(@{ SourceFilePath = $script:Second; DestinationFilePath = (Join-Path $to 'second.vhdx') })
        $script:Second = Join-Path $to 'second.vhdx'
    } 'the API decides' $null
    & $still 'growing the disk' { Resize-VHD -Path $script:Second -SizeBytes ((Get-VHD -Path $script:Second).Size + 64MB) } 'vmtide reads in full whatever it says' $null
    & $still 'Optimize-VHD while the VM is off' {
        Stop-VM -Name $VmName -TurnOff -Force
        Optimize-VHD -Path $script:Second -Mode Full
        Start-VM -Name $VmName
    } 'vmtide asks; if good, nothing may be lost' $null
    Test-Question 'Writes to the disk of a VM that is off: are they told, or is the id lost?' 'one of the two; never neither' {
        $id = @((New-ReferencePoint).point.ResilientChangeTrackingIdentifiers)[1]
        Stop-VM -Name $VmName -TurnOff -Force
        $offsets = [uint64[]]@((1MB + 512), 100MB, (700MB + 4096))
        Write-Offline $script:Second $offsets 512
        $changes = Get-DiskChanges $script:Second $id ((Get-VHD -Path $script:Second).Size)
        Start-VM -Name $VmName
        $covered = @($offsets | ForEach-Object { Test-Covered $changes.ranges $_ 512 })
        @{ found = @{ good = $changes.ok; covered = $covered; ranges = $changes.ranges }; holds = ((-not $changes.ok) -or ($covered -notcontains $false)) }
    }
    Test-Question 'Without its .rct and .mrt files: is the id lost?' 'yes; never an empty list' {
        $id = @((New-ReferencePoint).point.ResilientChangeTrackingIdentifiers)[1]
        Stop-VM -Name $VmName -TurnOff -Force
        Get-ChildItem -Path (Split-Path $script:Second) | Where-Object { $_.Name -like 'second.vhdx.*' } | Remove-Item -Force
        $changes = Get-DiskChanges $script:Second $id ((Get-VHD -Path $script:Second).Size)
        Start-VM -Name $VmName
        @{ found = $changes; holds = (-not $changes.ok) }
    }
}

# What needs a guest: writes from inside at known places, and whether just these are told.
function Test-Guest {
    if (-not $GuestDisk) { return }
    Test-Question 'Does PowerShell Direct reach the guest?' 'yes' {
        $deadline = (Get-Date).AddMinutes(5)
        do {
            $name = Invoke-Command -VMName $VmName -Credential $GuestCredential -ScriptBlock { $env:COMPUTERNAME } -ErrorAction SilentlyContinue
            Start-Sleep -Seconds 5
        } until ($name -or (Get-Date) -gt $deadline)
        @{ found = [bool]$name; holds = [bool]$name }
    }
    Test-Question 'How fine is change tracking, and are its offsets those of the disk?' 'every write is covered' {
        $id = @((New-ReferencePoint).point.ResilientChangeTrackingIdentifiers)[1]
        $writes = @(@(1048576, 512), @(10489856, 4096), @(104861696, 65536), @(734007808, 512))
        Invoke-Command -VMName $VmName -Credential $GuestCredential -ArgumentList $writes, $RawDisk -ScriptBlock {
            param($Writes, $Source)
            $disk = Get-Disk | Where-Object { $_.Size -lt 2GB -and -not $_.IsBoot } | Select-Object -First 1
            Set-Disk -Number $disk.Number -IsOffline $true
            Add-Type -TypeDefinition $Source
            foreach ($write in $Writes) {
                $bytes = New-Object byte[] $write[1]
                (New-Object System.Random 2).NextBytes($bytes)
                [VmtideRawDisk]::Write($disk.Number, [int64]$write[0], $bytes)
            }
        }
        [void](New-RecoveryCheckpoint 2)
        $frozen = @(Get-DiskPaths (Get-Settings 'Snapshot:Recovery' | Select-Object -First 1))[1]
        $changes = Get-DiskChanges $frozen $id ((Get-VHD -Path $frozen).Size)
        Get-VMSnapshot -VMName $VmName -SnapshotType Recovery | Remove-VMSnapshot
        [void](Wait-Merge)
        $covered = @($writes | ForEach-Object { Test-Covered $changes.ranges ([uint64]$_[0]) ([uint64]$_[1]) })
        @{ found = @{ writes = $writes; ranges = $changes.ranges; covered = $covered }; holds = ($changes.ok -and $covered -notcontains $false) }
    }
    Test-Question 'Is an application-consistent checkpoint made?' 'yes' {
        $end = New-RecoveryCheckpoint 1
        $snapshot = Get-Settings 'Snapshot:Recovery' | Select-Object -First 1
        Get-VMSnapshot -VMName $VmName -SnapshotType Recovery | Remove-VMSnapshot
        [void](Wait-Merge)
        @{ found = @{ end = $end; instance_id = $snapshot.InstanceID }; holds = (Test-Done $end) }
    }
}

function Test-Network {
    Test-Question 'What does the guest''s network configuration of an adapter look like?' '' {
        $found = @(Get-CimInstance -Namespace $Namespace -ClassName Msvm_GuestNetworkAdapterConfiguration |
            Where-Object { $_.InstanceID -like ('*' + $script:VmId + '*') } |
            ForEach-Object { @{ instance_id = $_.InstanceID; dhcp = $_.DHCPEnabled; protocol = $_.ProtocolIFType } })
        @{ found = $found; holds = $null }
    }
}

function Test-Leftovers {
    Test-Question 'Does destroying the reference points leave anything behind?' 'no' {
        $service = Get-HostService 'Msvm_VirtualSystemReferencePointService'
        $ends = @()
        foreach ($point in Get-ReferencePoints) {
            $ends += Wait-HostJob (Invoke-CimMethod -InputObject $service -MethodName DestroyReferencePoint -Arguments @{ AffectedReferencePoint = $point })
        }
        $files = @(Get-ChildItem -Path $Directory -Recurse | Where-Object { $_.Name -like '*.avhdx' } | ForEach-Object { $_.Name })
        $left = @(Get-ReferencePoints).Count
        @{ found = @{ destroyed = $ends.Count; points = $left; avhdx = $files }; holds = ($left -eq 0 -and $files.Count -eq 0) }
    }
}

# --- The run ------------------------------------------------------------------------------------------------------------

Add-Type -TypeDefinition $RawDisk
Add-Type -TypeDefinition $VirtDisk
Add-Type -TypeDefinition $RawReader
$script:IsOurs = $false
$script:VmId = $null
$script:Base = @()
$script:Newest = @()
$script:Frozen = @()
try {
    Test-Host
    New-ThrowAwayVm
    Test-Checkpoint
    Test-ReferencePoint
    Test-Changes
    Test-Attach
    Test-Events
    Test-DiskEvents
    Test-Guest
    Test-GuestBackupType
    Test-Network
    Test-Cluster
    Test-Cycles
    Test-Vmtide
    Test-Leftovers
} catch {
    Add-Answer 'The run' 'failed' $_.Exception.Message ''
} finally {
    try { Remove-ThrowAwayVm } catch { Add-Answer 'Removing the throw-away VM' 'failed' $_.Exception.Message 'remove it by hand' }
    Save-Report
}
if (@($Answers | Where-Object { $_.outcome -in 'otherwise', 'failed' }).Count -gt 0) { exit 1 }
