<#
The longer questions of hyperv-acceptance.ps1, which loads this file: it must lie beside it. It does nothing by itself.
#>

# virtdisk.dll, as vmtide's agent uses it: a disk attached without a device, read by its handle; the newest tracking id of a file.
$VirtDisk = @'
using System; using System.Runtime.InteropServices; using Microsoft.Win32.SafeHandles;
public static class VmtideVirtDisk {
    [StructLayout(LayoutKind.Sequential)] public struct StorageType { public uint Device; public Guid Vendor; }
    [StructLayout(LayoutKind.Sequential)] public struct OpenParameters { public uint Version; public int GetInfoOnly; public int ReadOnly; public Guid Resiliency; }
    [StructLayout(LayoutKind.Sequential)] public struct AttachParameters { public uint Version; public uint Reserved; }
    [DllImport("virtdisk.dll", CharSet = CharSet.Unicode)]
    static extern uint OpenVirtualDisk(ref StorageType type, string path, uint access, uint flags, ref OpenParameters parameters, out SafeFileHandle handle);
    [DllImport("virtdisk.dll")]
    static extern uint AttachVirtualDisk(SafeFileHandle handle, IntPtr security, uint flags, uint provider, ref AttachParameters parameters, IntPtr overlapped);
    [DllImport("virtdisk.dll")]
    static extern uint DetachVirtualDisk(SafeFileHandle handle, uint flags, uint provider);
    [DllImport("virtdisk.dll")]
    static extern uint GetVirtualDiskInformation(SafeFileHandle handle, ref uint size, IntPtr information, out uint used);
    [DllImport("kernel32.dll", SetLastError = true)]
    static extern bool ReadFile(SafeFileHandle handle, IntPtr buffer, uint length, IntPtr read, ref System.Threading.NativeOverlapped overlapped);
    [DllImport("kernel32.dll", SetLastError = true)]
    static extern bool GetOverlappedResult(SafeFileHandle handle, ref System.Threading.NativeOverlapped overlapped, out uint length, bool wait);

    static SafeFileHandle Open(string path, bool informationOnly) {
        StorageType type = new StorageType();
        type.Device = 3;
        type.Vendor = new Guid("EC984AEC-A0F9-47e9-901F-71415A66345B");
        OpenParameters parameters = new OpenParameters();
        parameters.Version = 2; parameters.GetInfoOnly = informationOnly ? 1 : 0; parameters.ReadOnly = 1;
        SafeFileHandle handle;
        uint code = OpenVirtualDisk(ref type, path, 0, 0, ref parameters, out handle);
        if (code != 0) throw new System.ComponentModel.Win32Exception((int)code, "OpenVirtualDisk " + code);
        return handle;
    }

    // The bytes at an offset of a disk that is attached with READ_ONLY and NO_LOCAL_HOST.
    public static byte[] ReadWithoutDevice(string path, long offset, int length) {
        using (SafeFileHandle handle = Open(path, false)) {
            AttachParameters parameters = new AttachParameters();
            parameters.Version = 1;
            uint code = AttachVirtualDisk(handle, IntPtr.Zero, 1 | 8, 0, ref parameters, IntPtr.Zero);
            if (code != 0) throw new System.ComponentModel.Win32Exception((int)code, "AttachVirtualDisk " + code);
            IntPtr buffer = Marshal.AllocHGlobal(length + 4096);
            try {
                IntPtr aligned = new IntPtr((buffer.ToInt64() + 4095) & ~4095L);
                System.Threading.NativeOverlapped overlapped = new System.Threading.NativeOverlapped();
                overlapped.OffsetLow = unchecked((int)offset); overlapped.OffsetHigh = (int)(offset >> 32);
                if (!ReadFile(handle, aligned, (uint)length, IntPtr.Zero, ref overlapped) && Marshal.GetLastWin32Error() != 997)
                    throw new System.ComponentModel.Win32Exception(Marshal.GetLastWin32Error(), "ReadFile " + Marshal.GetLastWin32Error());
                uint read;
                if (!GetOverlappedResult(handle, ref overlapped, out read, true))
                    throw new System.ComponentModel.Win32Exception(Marshal.GetLastWin32Error(), "ReadFile " + Marshal.GetLastWin32Error());
                byte[] data = new byte[read];
                Marshal.Copy(aligned, data, 0, (int)read);
                return data;
            } finally { Marshal.FreeHGlobal(buffer); DetachVirtualDisk(handle, 0, 0); }
        }
    }

    // GET_VIRTUAL_DISK_INFO_CHANGE_TRACKING_STATE: whether changes are tracked is at 8, the newest id at 16.
    public static string NewestId(string path) {
        const int bytes = 2048;
        using (SafeFileHandle handle = Open(path, true)) {
            IntPtr information = Marshal.AllocHGlobal(bytes);
            try {
                for (int i = 0; i < bytes; i++) Marshal.WriteByte(information, i, 0);
                Marshal.WriteInt32(information, 15);
                uint size = bytes; uint used;
                uint code = GetVirtualDiskInformation(handle, ref size, information, out used);
                if (code != 0) throw new System.ComponentModel.Win32Exception((int)code, "GetVirtualDiskInformation " + code);
                return Marshal.ReadInt32(information, 8) == 0 ? null : Marshal.PtrToStringUni(new IntPtr(information.ToInt64() + 16));
            } finally { Marshal.FreeHGlobal(information); }
        }
    }
}
'@

# Reads the whole of a raw disk by its number: its SHA-256, or ranges of it into a copy.
$RawReader = @'
using System; using System.IO; using System.Runtime.InteropServices; using System.Security.Cryptography; using Microsoft.Win32.SafeHandles;
public static class VmtideRawReader {
    [DllImport("kernel32.dll", CharSet = CharSet.Unicode, SetLastError = true)]
    static extern SafeFileHandle CreateFile(string name, uint access, uint share, IntPtr security, uint how, uint flags, IntPtr template);
    static FileStream Open(int number) {
        SafeFileHandle handle = CreateFile("\\\\.\\PhysicalDrive" + number, 0x80000000, 3, IntPtr.Zero, 3, 0, IntPtr.Zero);
        if (handle.IsInvalid) throw new System.ComponentModel.Win32Exception(Marshal.GetLastWin32Error());
        return new FileStream(handle, FileAccess.Read, 1);
    }
    static string Text(byte[] hash) { return BitConverter.ToString(hash).Replace("-", "").ToLowerInvariant(); }
    public static string Hash(int number, long length) {
        using (SHA256 sha = SHA256.Create()) using (FileStream disk = Open(number)) {
            byte[] buffer = new byte[1 << 20];
            for (long done = 0; done < length; ) {
                int read = disk.Read(buffer, 0, (int)Math.Min(buffer.Length, length - done));
                if (read <= 0) throw new EndOfStreamException();
                sha.TransformBlock(buffer, 0, read, null, 0);
                done += read;
            }
            sha.TransformFinalBlock(buffer, 0, 0);
            return Text(sha.Hash);
        }
    }
    public static void CopyRange(int number, string copy, long offset, long length) {
        // Raw disks are read in whole sectors.
        long end = (offset + length + 4095) & ~4095L;
        offset = offset & ~4095L;
        using (FileStream disk = Open(number)) using (FileStream to = new FileStream(copy, FileMode.OpenOrCreate, FileAccess.Write)) {
            byte[] buffer = new byte[1 << 20];
            disk.Seek(offset, SeekOrigin.Begin); to.Seek(offset, SeekOrigin.Begin);
            while (offset < end) {
                int read = disk.Read(buffer, 0, (int)Math.Min(buffer.Length, end - offset));
                if (read <= 0) throw new EndOfStreamException();
                to.Write(buffer, 0, read);
                offset += read;
            }
        }
    }
    public static string HashFile(string path) {
        using (SHA256 sha = SHA256.Create()) using (FileStream file = File.OpenRead(path)) { return Text(sha.ComputeHash(file)); }
    }
}
'@

# Attaches a disk that nobody writes for reading, and gives its number to the block.
function Use-AttachedDisk([string]$Path, [scriptblock]$Do) {
    $attached = Mount-VHD -Path $Path -ReadOnly -NoDriveLetter -Passthru
    try { & $Do ($attached | Get-Disk).Number } finally { Dismount-VHD -Path $Path }
}

function Get-DiskHash([string]$Path) {
    $size = [int64](Get-VHD -Path $Path).Size
    Use-AttachedDisk $Path { param($Number) [VmtideRawReader]::Hash($Number, $size) }
}

function Remove-RecoveryCheckpoints {
    Get-VMSnapshot -VMName $VmName -SnapshotType Recovery -ErrorAction SilentlyContinue | Remove-VMSnapshot
    [void](Wait-Merge)
}

# A new reference point's id of the second disk.
function New-SecondId { @((New-ReferencePoint).point.ResilientChangeTrackingIdentifiers)[1] }

# --- Reading frozen disks -----------------------------------------------------------------------------------------------

function Test-Attach {
    [void](New-RecoveryCheckpoint 2)
    $snapshot = Get-Settings 'Snapshot:Recovery' | Select-Object -First 1
    $frozen = @(Get-DiskPaths $snapshot)[1]
    $places = @{ 'its path' = $frozen }
    if ($frozen -match '^([A-Za-z]):\\(.*)$') { $places['the path over SMB'] = '\\localhost\' + $Matches[1] + '$\' + $Matches[2] }
    foreach ($place in $places.Keys) {
        $path = $places[$place]
        Test-Question ('Can the frozen parent of a running VM be attached with NO_LOCAL_HOST and read by its handle, by ' + $place + '?') 'yes; else vmtide attaches a device' {
            $data = [VmtideVirtDisk]::ReadWithoutDevice($path, 0, 1MB)
            @{ found = @{ bytes = $data.Length; cluster_volume = ($path -like '*\ClusterStorage\*') }; holds = ($data.Length -eq 1MB) }
        }
    }
    Test-Question 'Which tracking id does a frozen file tell as its newest?' 'the one that the reference point made of it has' {
        $newest = [VmtideVirtDisk]::NewestId($frozen)
        $before = @(Get-ReferencePoints | ForEach-Object { $_.InstanceID })
        $service = Get-HostService 'Msvm_VirtualSystemSnapshotService'
        [void](Wait-HostJob (Invoke-CimMethod -InputObject $service -MethodName ConvertToReferencePoint -Arguments @{ AffectedSnapshot = $snapshot }))
        [void](Wait-Merge)
        $point = Get-ReferencePoints | Where-Object { $_.InstanceID -notin $before } | Select-Object -First 1
        $id = @($point.ResilientChangeTrackingIdentifiers)[1]
        @{ found = @{ of_the_file = $newest; of_the_point = $id }; holds = ($newest -eq $id) }
    }
    Remove-RecoveryCheckpoints
}

function Test-GuestBackupType {
    Test-Question 'Are full (1) and copy (2) taken as GuestBackupType?' 'yes; copy leaves the logs of applications alone' {
        $found = @{}
        foreach ($type in 1, 2) {
            $consistency = 2
            if ($GuestDisk) { $consistency = 1 }
            $found["$type"] = @{ end = (New-RecoveryCheckpoint $consistency $type) }
            Remove-RecoveryCheckpoints
            if ($GuestDisk) { $found["$type"].sql = Get-SqlBackups }
        }
        @{ found = $found; holds = ((Test-Done $found['1'].end) -and (Test-Done $found['2'].end)) }
    }
}

# The newest backups that SQL Server in the guest knows of: a copy has is_copy_only 1. None where there is no SQL Server.
function Get-SqlBackups {
    Invoke-Command -VMName $VmName -Credential $GuestCredential -ScriptBlock {
        if (-not (Get-Service -Name 'MSSQL*' -ErrorAction SilentlyContinue)) { return 'no SQL Server in the guest' }
        $query = 'SET NOCOUNT ON; SELECT TOP 5 database_name, type, is_copy_only, is_snapshot FROM msdb.dbo.backupset ORDER BY backup_finish_date DESC'
        & sqlcmd.exe -E -W -h -1 -Q $query
    }
}

# --- What happens to disks ----------------------------------------------------------------------------------------------

# Asks about an id after something happened to the disk. Where it is still good, what was written since must be told.
function Get-Verdict([string]$Id, [uint64[]]$Offsets) {
    $changes = Get-DiskChanges $script:Second $Id ((Get-VHD -Path $script:Second).Size)
    $covered = @($Offsets | ForEach-Object { Test-Covered $changes.ranges $_ 512 })
    $holds = (-not $changes.ok) -or ($covered -notcontains $false)
    @{ found = @{ good = $changes.ok; covered = $covered; ranges = $changes.ranges; end = $changes.end }; holds = $holds }
}

function Test-DiskEvents {
    Test-Question 'A user checkpoint applied: are ids refused that were made after it, or is told what it took back?' 'unknown; vmtide reads in full after one was applied' {
        Checkpoint-VM -Name $VmName -SnapshotName 'to-apply'
        Stop-VM -Name $VmName -TurnOff -Force
        $offsets = [uint64[]]@(4MB, 300MB)
        Write-Offline (@(Get-DiskPaths (Get-Settings 'System:Realized'))[1]) $offsets 512
        Start-VM -Name $VmName
        # The checkpoint stands: reference points do not wait for its merge.
        $before = @(Get-ReferencePoints | ForEach-Object { $_.InstanceID })
        [void](New-RecoveryCheckpoint 2)
        $snapshot = Get-Settings 'Snapshot:Recovery' | Select-Object -First 1
        $service = Get-HostService 'Msvm_VirtualSystemSnapshotService'
        $end = Wait-HostJob (Invoke-CimMethod -InputObject $service -MethodName ConvertToReferencePoint -Arguments @{ AffectedSnapshot = $snapshot })
        $point = Get-ReferencePoints | Where-Object { $_.InstanceID -notin $before } | Select-Object -First 1
        $id = @($point.ResilientChangeTrackingIdentifiers)[1]
        Restore-VMSnapshot -VMName $VmName -Name 'to-apply' -Confirm:$false
        $live = @(Get-DiskPaths (Get-Settings 'System:Realized'))[1]
        $applied = Get-DiskChanges $live $id ((Get-VHD -Path $live).Size)
        $settings = Get-Settings 'System:Realized' | Select-Object -First 1
        Remove-VMSnapshot -VMName $VmName -Name 'to-apply'
        Start-Sleep -Seconds 2
        [void](Wait-Merge)
        $merged = Get-Verdict $id $offsets
        if ((Get-VM -Name $VmName).State -ne 'Running') { Start-VM -Name $VmName }
        @{ found = @{ conversion = $end; while_applied = $applied; after_merge = $merged.found; last_applied = $settings.LastAppliedSnapshot }; holds = $merged.holds }
    }
    $changed = {
        param([string]$What, [scriptblock]$Do)
        Test-Question ('Does an id survive: ' + $What + '?') 'vmtide asks; where it is good, nothing may be lost' {
            $id = New-SecondId
            Stop-VM -Name $VmName -TurnOff -Force
            $offsets = [uint64[]]@(2MB, 500MB)
            Write-Offline $script:Second $offsets 512
            & $Do
            $verdict = Get-Verdict $id $offsets
            $verdict.found['started'] = $true
            try { Start-VM -Name $VmName } catch { $verdict.found['started'] = $_.Exception.Message }
            $verdict
        }
    }
    & $changed 'Set-VHD with a new identifier' { Set-VHD -Path $script:Second -ResetDiskIdentifier -Force }
    & $changed 'Set-VHD with another physical sector size' {
        $bytes = 4096
        if ((Get-VHD -Path $script:Second).PhysicalSectorSize -eq 4096) { $bytes = 512 }
        Set-VHD -Path $script:Second -PhysicalSectorSizeBytes $bytes
    }
    & $changed 'Convert-VHD to a new file in the place of the old one' {
        $new = $script:Second + '.new.vhdx'
        Convert-VHD -Path $script:Second -DestinationPath $new -VHDType Dynamic
        Remove-Item -Path $script:Second -Force
        Move-Item -Path $new -Destination $script:Second
    }
    & $changed 'Resize-VHD, larger and smaller again, while the VM is off' {
        $size = (Get-VHD -Path $script:Second).Size
        Resize-VHD -Path $script:Second -SizeBytes ($size + 64MB)
        Resize-VHD -Path $script:Second -SizeBytes $size
    }
    Test-Question 'As vmtide restores in place: reference points, .rct and .mrt removed while the VM is off, the disk written. Does the VM start, and is tracking begun anew?' 'yes; the old id is refused' {
        $id = New-SecondId
        Stop-VM -Name $VmName -TurnOff -Force
        $service = Get-HostService 'Msvm_VirtualSystemReferencePointService'
        foreach ($point in Get-ReferencePoints) {
            [void](Wait-HostJob (Invoke-CimMethod -InputObject $service -MethodName DestroyReferencePoint -Arguments @{ AffectedReferencePoint = $point }))
        }
        $removed = @(Get-ChildItem -Path (Split-Path $script:Second) | Where-Object { $_.Name -like '*.rct' -or $_.Name -like '*.mrt' })
        $removed | Remove-Item -Force
        Write-Offline $script:Second ([uint64[]]@(8MB, 900MB)) 512
        $old = Get-DiskChanges $script:Second $id ((Get-VHD -Path $script:Second).Size)
        Start-VM -Name $VmName
        $new = New-SecondId
        $good = Get-DiskChanges $script:Second $new ((Get-VHD -Path $script:Second).Size)
        $after = Get-DiskChanges $script:Second $id ((Get-VHD -Path $script:Second).Size)
        @{ found = @{ removed = @($removed | ForEach-Object { $_.Name }); old_while_off = $old; old_when_started = $after; new = $good }
            holds = ((-not $old.ok) -and (-not $after.ok) -and $good.ok) }
    }
}

# --- Clusters -----------------------------------------------------------------------------------------------------------

function Test-Cluster {
    $nodes = @()
    if (Get-Command -Name Get-ClusterNode -ErrorAction SilentlyContinue) {
        $nodes = @(Get-ClusterNode -ErrorAction SilentlyContinue | Where-Object { "$($_.State)" -eq 'Up' } | ForEach-Object { $_.Name })
    }
    if ($nodes.Count -lt 2) { Add-Answer 'Live migration' 'told' 'left out: no cluster with two nodes that run' ''; return }
    if ($Directory -notlike '*\ClusterStorage\*') {
        Add-Answer 'Live migration' 'told' 'left out: -Directory is on no cluster shared volume (C:\ClusterStorage\...)' ''
        return
    }
    Test-Question 'Does an id survive a live migration to another node and back?' 'yes; the API decides' {
        $other = $nodes | Where-Object { $_ -ne $env:COMPUTERNAME } | Select-Object -First 1
        $id = New-SecondId
        [void](Add-ClusterVirtualMachineRole -VMName $VmName)
        try {
            [void](Move-ClusterVirtualMachineRole -Name $VmName -Node $other -MigrationType Live)
            [void](Move-ClusterVirtualMachineRole -Name $VmName -Node $env:COMPUTERNAME -MigrationType Live)
        } finally { Remove-ClusterGroup -Name $VmName -RemoveResources -Force }
        $points = @(Get-ReferencePoints).Count
        $changes = Get-DiskChanges $script:Second $id ((Get-VHD -Path $script:Second).Size)
        @{ found = @{ good = $changes.ok; changes = $changes; reference_points = $points }; holds = $null }
    }
}

# --- Many cycles --------------------------------------------------------------------------------------------------------

# The guest writes at random places; what is told is copied from the frozen disk; the copy must be the disk. Every second run of
# cycles keeps no reference point and takes the id that the frozen file tells, as other products do.
function Test-Cycles {
    if ($Cycles -lt 1) { return }
    if (-not $GuestDisk) { Add-Answer 'Cycles' 'told' 'left out: they need -GuestDisk' ''; return }
    foreach ($keep in $true, $false) {
        $how = 'with a reference point'
        if (-not $keep) { $how = 'without a reference point, by the newest id of the frozen file' }
        Test-Question ("$Cycles cycles $how" + ': is the copy always the disk?') 'with one, always' {
            $copy = Join-Path $Directory 'copy.raw'
            $id = $null
            $wrong = @()
            $lost = @()
            for ($cycle = 0; $cycle -lt $Cycles; $cycle++) {
                Write-FromGuest $cycle
                [void](New-RecoveryCheckpoint 2)
                $snapshot = Get-Settings 'Snapshot:Recovery' | Select-Object -First 1
                $frozen = @(Get-DiskPaths $snapshot)[1]
                $size = [uint64](Get-VHD -Path $frozen).Size
                $ranges = @(, @([uint64]0, $size))
                if ($id) {
                    $changes = Get-DiskChanges $frozen $id $size
                    if ($changes.ok) { $ranges = $changes.ranges } else { $lost += $cycle }
                }
                $newest = [VmtideVirtDisk]::NewestId($frozen)
                $hash = Use-AttachedDisk $frozen {
                    param($Number)
                    foreach ($range in $ranges) { [VmtideRawReader]::CopyRange($Number, $copy, [int64]$range[0], [int64]$range[1]) }
                    [VmtideRawReader]::Hash($Number, [int64]$size)
                }
                if ([VmtideRawReader]::HashFile($copy) -ne $hash) { $wrong += $cycle }
                if ($keep) {
                    $service = Get-HostService 'Msvm_VirtualSystemSnapshotService'
                    $before = @(Get-ReferencePoints)
                    [void](Wait-HostJob (Invoke-CimMethod -InputObject $service -MethodName ConvertToReferencePoint -Arguments @{ AffectedSnapshot = $snapshot }))
                    $point = Get-ReferencePoints | Where-Object { $_.InstanceID -notin @($before | ForEach-Object { $_.InstanceID }) } | Select-Object -First 1
                    $id = @($point.ResilientChangeTrackingIdentifiers)[1]
                    $points = Get-HostService 'Msvm_VirtualSystemReferencePointService'
                    foreach ($old in $before) {
                        [void](Wait-HostJob (Invoke-CimMethod -InputObject $points -MethodName DestroyReferencePoint -Arguments @{ AffectedReferencePoint = $old }))
                    }
                } else {
                    $id = $newest
                    Get-VMSnapshot -VMName $VmName -SnapshotType Recovery | Remove-VMSnapshot
                }
                [void](Wait-Merge)
            }
            Remove-Item -Path $copy -Force
            $holds = $null
            if ($keep) { $holds = ($wrong.Count -eq 0) }
            @{ found = @{ cycles = $Cycles; wrong = $wrong; ids_lost = $lost }; holds = $holds }
        }
    }
}

function Write-FromGuest([int]$Seed) {
    Invoke-Command -VMName $VmName -Credential $GuestCredential -ArgumentList $Seed, $RawDisk -ScriptBlock {
        param($Seed, $Source)
        $disk = Get-Disk | Where-Object { $_.Size -lt 2GB -and -not $_.IsBoot } | Select-Object -First 1
        if (-not $disk.IsOffline) { Set-Disk -Number $disk.Number -IsOffline $true }
        if (-not ('VmtideRawDisk' -as [type])) { Add-Type -TypeDefinition $Source }
        $random = New-Object System.Random $Seed
        for ($i = 0; $i -lt 20; $i++) {
            $bytes = New-Object byte[] (512 * $random.Next(1, 129))
            $random.NextBytes($bytes)
            [VmtideRawDisk]::Write($disk.Number, [int64]512 * $random.Next(0, [int]($disk.Size / 512) - 256), $bytes)
        }
    }
}

# --- vmtide itself ------------------------------------------------------------------------------------------------------

# Runs vmtide.exe. Answers with its exit code and the events of its --json.
function Invoke-Vmtide([string[]]$Words) {
    $start = New-Object System.Diagnostics.ProcessStartInfo
    $start.FileName = $Vmtide
    $start.Arguments = (@($Words) + '--json' | ForEach-Object { '"' + $_ + '"' }) -join ' '
    $start.UseShellExecute = $false
    $start.RedirectStandardOutput = $true
    $start.RedirectStandardError = $true
    $start.StandardOutputEncoding = [System.Text.Encoding]::UTF8
    $start.StandardErrorEncoding = [System.Text.Encoding]::UTF8
    $start.EnvironmentVariables['VMTIDE_PASSWORD'] = 'vmtide acceptance'
    $start.EnvironmentVariables['VMTIDE_REPOSITORY'] = (Join-Path $Directory 'repository')
    $start.EnvironmentVariables['VMTIDE_STATE_DIR'] = (Join-Path $Directory 'state')
    $process = [System.Diagnostics.Process]::Start($start)
    $errors = $process.StandardError.ReadToEndAsync()
    $output = $process.StandardOutput.ReadToEnd()
    $process.WaitForExit()
    $events = @()
    foreach ($line in ($output -split "`n")) { if ($line.Trim()) { $events += ConvertFrom-Json $line } }
    $last = $events | Select-Object -Last 1
    @{ code = $process.ExitCode; events = $events; last = $last; stderr = $errors.Result }
}

# The restored VMs are named after the throw-away one; they are removed with it.
function Remove-Restored {
    foreach ($vm in @(Get-VM -Name ($VmName + '-*') -ErrorAction SilentlyContinue)) {
        Stop-VM -VM $vm -TurnOff -Force -ErrorAction SilentlyContinue
        Remove-VM -VM $vm -Force
    }
}

function Test-Vmtide {
    if (-not $Vmtide) { return }
    $source = 'hyperv:///' + $VmName
    Test-Question 'vmtide.exe: version, repository' 'they work' {
        $init = Invoke-Vmtide @('init', (Join-Path $Directory 'repository'))
        @{ found = @{ version = "$(& $Vmtide --version)"; code = $init.code; stderr = $init.stderr }; holds = ($init.code -eq 0) }
    }
    Test-Question 'vmtide doctor: what does it say of this host and VM?' 'nothing fails' {
        $run = Invoke-Vmtide @('doctor', $source)
        @{ found = @{ code = $run.code; last = $run.last; stderr = $run.stderr }; holds = ($run.code -in 0, 3) }
    }
    Test-Question 'vmtide backup --level full' 'it ends with 0 or 3' {
        Stop-VM -Name $VmName -TurnOff -Force
        Write-Offline $script:Second ([uint64[]]@(1MB, 200MB, 800MB)) 65536
        Start-VM -Name $VmName
        $run = Invoke-Vmtide @('backup', $source, '--level', 'full')
        @{ found = @{ code = $run.code; last = $run.last; stderr = $run.stderr }; holds = ($run.code -in 0, 3) }
    }
    Test-Question 'vmtide backup: an incremental one' 'change tracking is used for every disk' {
        if ($GuestDisk) { Write-FromGuest 4711 }
        $run = Invoke-Vmtide @('backup', $source)
        $unused = @($run.last.disks | Where-Object { -not $_.tracking.used }).Count
        @{ found = @{ code = $run.code; last = $run.last; stderr = $run.stderr }; holds = ($run.code -in 0, 3 -and $unused -eq 0) }
    }
    Test-Question 'Between backups: what does vmtide leave on the host?' 'one reference point, no checkpoint, no AVHDX' {
        [void](Wait-Merge)
        $checkpoints = @(Get-Settings 'Snapshot:Recovery').Count
        $points = @(Get-ReferencePoints | ForEach-Object { $_.InstanceID })
        @{ found = @{ checkpoints = $checkpoints; reference_points = $points }; holds = ($checkpoints -eq 0) }
    }
    # From here on nobody writes, so that disks can be compared. A guest may have written since the backup: one more is made.
    Stop-VM -Name $VmName -TurnOff -Force
    $last = Invoke-Vmtide @('backup', $source)
    Add-Answer 'vmtide backup: of a VM that is off' $(if ($last.code -in 0, 3) { 'as-assumed' } else { 'otherwise' }) @{ code = $last.code; last = $last.last; stderr = $last.stderr } 'it ends with 0 or 3'
    $expected = @(Get-DiskPaths (Get-Settings 'System:Realized') | ForEach-Object { Get-DiskHash $_ } | Sort-Object)
    foreach ($route in 'exact', 'portable') {
        Test-Question ("vmtide restore --route $route" + ': are the disks the same, byte by byte, and does the VM start?') 'yes' {
            $name = $VmName + '-' + $route
            $run = Invoke-Vmtide @('restore', ($VmName + '@latest'), '--to', ('hyperv:///' + $name), '--new-id', '--route', $route,
                '--directory', (Join-Path $Directory 'restored'), '--verify')
            if ($run.code -notin 0, 3) { return @{ found = @{ code = $run.code; last = $run.last; stderr = $run.stderr }; holds = $false } }
            $paths = @(Get-VMHardDiskDrive -VMName $name | ForEach-Object { $_.Path })
            $found = @($paths | ForEach-Object { Get-DiskHash $_ } | Sort-Object)
            $same = ($found -join ' ') -eq ($expected -join ' ')
            $started = 'yes'
            try { Start-VM -Name $name; Stop-VM -Name $name -TurnOff -Force } catch { $started = $_.Exception.Message }
            @{ found = @{ code = $run.code; last = $run.last; same = $same; started = $started }; holds = ($same -and $started -eq 'yes') }
        }
    }
    Test-Question 'vmtide verify --read-data' 'all is whole' {
        $run = Invoke-Vmtide @('verify', '--read-data')
        @{ found = @{ code = $run.code; last = $run.last; stderr = $run.stderr }; holds = ($run.code -eq 0) }
    }
    Remove-Restored
    Start-VM -Name $VmName
}
